// Two pictures of a batch in one place: under a slider, in turns, or as their difference.
import { api } from '../../scripts/api.js'
import { button, element } from './report.js'

const MODES = { Slider: 'Move the pointer over the picture', 'A/B': 'Click the picture', Difference: 'Amplified' }

function address(picture) {
  return api.apiURL(`/view?${new URLSearchParams(picture)}`)
}

export class Slider {
  constructor() {
    this.message = null
    this.mode = 'Slider'
    this.index = 0
    this.showsStudent = false
    this.original = element('img', 'dha-picture')
    this.student = element('img', 'dha-picture dha-over')
    this.line = element('div', 'dha-line')
    this.label = element('div', 'dha-label')
    this.stage = element('div', 'dha-stage', this.original, this.student, this.line, this.label)
    this.stage.addEventListener('pointermove', (event) => this.slide(event))
    this.stage.addEventListener('click', () => this.swap())
    this.next = button('', 'Next picture of the batch', () => this.turn())
    const modes = Object.entries(MODES).map(([mode, title]) => button(mode, title, () => this.choose(mode)))
    this.bar = element('div', 'dha-bar', ...modes, this.next)
    this.root = element('div', 'dha-slider', this.bar, this.stage)
    this.root.hidden = true
  }

  show(message) {
    this.message = message
    this.index = 0
    this.root.hidden = false
    this.update()
  }

  choose(mode) {
    this.mode = mode
    this.update()
  }

  turn() {
    this.index = (this.index + 1) % this.message.original.length
    this.update()
  }

  swap() {
    if (this.mode !== 'A/B') return
    this.showsStudent = !this.showsStudent
    this.update()
  }

  slide(event) {
    if (this.mode !== 'Slider') return
    const box = this.stage.getBoundingClientRect()
    this.place(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)))
  }

  // Original on the left of `part` of the width, student on its right.
  place(part) {
    this.line.style.left = `${100 * part}%`
    this.student.style.clipPath = `inset(0 0 0 ${100 * part}%)`
  }

  update() {
    const { original, student, difference } = this.message
    const count = original.length
    const isDifference = this.mode === 'Difference'
    this.original.src = address(isDifference ? difference[this.index] : original[this.index])
    this.student.src = address(student[this.index])
    this.line.hidden = this.mode !== 'Slider'
    this.student.hidden = isDifference || (this.mode === 'A/B' && !this.showsStudent)
    this.place(this.mode === 'Slider' ? 0.5 : 0)
    const names = { Slider: 'original | student', 'A/B': this.showsStudent ? 'B: student' : 'A: original' }
    this.label.textContent = names[this.mode] ?? 'difference'
    this.next.hidden = count < 2
    this.next.textContent = `${this.index + 1} of ${count}`
    for (const child of this.bar.children) child.classList.toggle('dha-chosen', child.textContent === this.mode)
  }
}
