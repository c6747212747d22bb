// Shows the results of DHA's nodes on the nodes themselves. Without it the nodes work as well, with less to see.
import { app } from '../../scripts/app.js'
import { element, makeReport } from './report.js'
import { Slider } from './slider.js'

// Pixels that a node's results need; a slider takes what there is.
const HEIGHT = {
  DHACompareModels: 190,
  DHAComparePictures: 480,
  DHABenchmark: 200,
  DHAMeasureLayers: 380,
  DHARoutingMap: 175,
  DKDTrain: 210,
  DKDTrainingRecord: 320
}

function addStyle() {
  const style = element('link', '')
  style.rel = 'stylesheet'
  style.href = new URL('./dha.css', import.meta.url).href
  document.head.append(style)
}

function addView(node, kind) {
  const slider = kind === 'DHAComparePictures' ? new Slider() : null
  const report = element('div', 'dha-report')
  const root = element('div', 'dha-view', ...(slider ? [slider.root] : []), report)
  const widget = node.addDOMWidget('dha_view', 'dha_view', root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => (root.dataset.filled ? HEIGHT[kind] : 0),
    getMaxHeight: () => (root.dataset.filled ? (slider ? undefined : HEIGHT[kind]) : 0)
  })
  // Not a setting of the node: it has no place among its saved values.
  widget.serialize = false
  return { root, slider, report }
}

function fillView(node, view, kind, message) {
  if (!message?.table) return
  view.root.dataset.filled = 'true'
  if (view.slider && message.original) view.slider.show(message)
  const report = makeReport(message, kind)
  view.report.replaceWith(report)
  view.report = report
  const [width, height] = node.size
  const wanted = node.computeSize()
  node.setSize([Math.max(width, wanted[0]), Math.max(height, wanted[1])])
  app.graph.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: 'dha.results',
  setup: addStyle,
  beforeRegisterNodeDef(nodeType, nodeData) {
    const kind = nodeData.name
    if (!(kind in HEIGHT)) return
    const { onNodeCreated, onExecuted } = nodeType.prototype
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments)
      this.dhaView = addView(this, kind)
    }
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments)
      fillView(this, this.dhaView, kind, message)
    }
  }
})
