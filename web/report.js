// The table that a DHA node sends beside its report, and a button that saves the report as a JSON file.

export function element(tag, className, ...children) {
  const made = document.createElement(tag)
  made.className = className
  made.append(...children)
  return made
}

export function button(label, title, onClick) {
  const made = element('button', 'dha-button', label)
  made.type = 'button'
  made.title = title
  made.addEventListener('click', onClick)
  return made
}

function makeTable(rows) {
  const table = element('table', 'dha-table')
  rows.forEach((row, number) => {
    const cells = row.map((cell) => element(number === 0 ? 'th' : 'td', '', cell))
    table.append(element('tr', '', ...cells))
  })
  return table
}

function saveAs(name, text) {
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }))
  link.download = name
  link.click()
  URL.revokeObjectURL(link.href)
}

// What a node has to say, from the message of its execution; nothing where there is no table in it.
export function makeReport(message, name) {
  const report = element('div', 'dha-report')
  if (!message.table?.length) return report
  report.append(element('div', 'dha-summary', message.summary[0]), makeTable(JSON.parse(message.table[0])))
  report.append(button('Save JSON', 'Save all figures as a file', () => saveAs(`${name}.json`, message.text[0])))
  return report
}
