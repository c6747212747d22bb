"""Graphs as the browser keeps them (UI format) and as the server runs them (API format), both ways."""

from collections.abc import Collection
from typing import Any

from .server import Graph

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTE_TYPES = {"Note", "MarkdownNote"}
BYPASSED = 4
GAP = 50
NOTE_SIZE = (700, 250)
WIDTH = 300
# Nodes that show something: pixels across, and down beyond their inputs.
ROOM = {
    "KSampler": (WIDTH, 280),
    "PreviewImage": (WIDTH, 280),
    "SaveImage": (WIDTH, 280),
    "DHACompareModels": (WIDTH, 170),
    "DHAComparePictures": (440, 560),
    "DHABenchmark": (520, 500),
    "DHAMeasureLayers": (520, 400),
    "DHARoutingMap": (520, 460),
    "DKDTrain": (520, 820),
}


def list_inputs(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, type and options of a node's inputs, in the order of its widgets, from its `/object_info` entry."""
    inputs = []
    for group in ("required", "optional"):
        for name, spec in (info["input"].get(group) or {}).items():
            inputs.append((name, spec[0], {**(spec[1] if len(spec) > 1 else {}), "optional": group == "optional"}))
    return inputs


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def choose_default(kind: Any, options: dict[str, Any]) -> Any:
    """The value a widget starts with in the browser."""
    if "default" in options:
        return options["default"]
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options")
        return choices[0] if choices else ""
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False, "STRING": ""}[kind]


def fill_defaults(graph: Graph, object_info: dict[str, Any]) -> Graph:
    """The graph with every widget that it leaves out at its default; raises KeyError for an unknown node."""
    filled = {}
    for key, entry in graph.items():
        widgets = [item for item in list_inputs(object_info[entry["class_type"]]) if is_widget(*item[1:])]
        defaults = {name: choose_default(kind, options) for name, kind, options in widgets}
        filled[key] = {**entry, "inputs": {**defaults, **entry["inputs"]}}
    return filled


def list_widget_values(inputs: dict[str, Any], info: dict[str, Any]) -> list:
    """`widgets_values` as the browser writes them: a linked widget keeps its place, a seed has a second value."""
    values = []
    for name, kind, options in list_inputs(info):
        if is_widget(kind, options):
            value = inputs.get(name)
            values.append(choose_default(kind, options) if value is None or isinstance(value, list) else value)
            if options.get("control_after_generate"):
                values.append("fixed")
    return values


def to_ui(
    graph: Graph,
    object_info: dict[str, Any],
    columns: list[list[str]],
    note: str,
    titles: dict[str, str] | None = None,
    bypassed: Collection[str] = (),
) -> dict[str, Any]:
    """A graph for the browser, from API format; `columns` are node ids from left to right, each from top to bottom."""
    graph = fill_defaults(graph, object_info)
    places = arrange(graph, object_info, columns)
    nodes: dict[str, dict[str, Any]] = {}
    for order, (key, entry) in enumerate(graph.items()):
        info = object_info[entry["class_type"]]
        wanted = [item for item in list_inputs(info) if not is_widget(*item[1:])]
        nodes[key] = {
            "id": int(key),
            "type": entry["class_type"],
            **({"title": titles[key]} if titles and key in titles else {}),
            "pos": places[key],
            "size": list(measure(entry, info)),
            "flags": {},
            "order": order,
            "mode": BYPASSED if key in bypassed else 0,
            "inputs": [{"name": name, "type": describe_type(kind), "link": None} for name, kind, _ in wanted],
            "outputs": [
                {"name": name, "type": describe_type(kind), "links": []}
                for name, kind in zip(info["output_name"], info["output"], strict=True)
            ],
            "properties": {"Node name for S&R": entry["class_type"]},
            "widgets_values": list_widget_values(entry["inputs"], info),
        }
    links = connect(graph, nodes)
    last = max(int(key) for key in graph) + 1
    text = {"id": last, "type": "MarkdownNote", "pos": [0, -NOTE_SIZE[1] - GAP], "size": list(NOTE_SIZE)}
    text |= {"flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    text["widgets_values"] = [note]
    ui = {"last_node_id": last, "last_link_id": len(links), "nodes": [*nodes.values(), text], "links": links}
    return ui | {"groups": [], "config": {}, "extra": {}, "version": 0.4}


def arrange(graph: Graph, object_info: dict[str, Any], columns: list[list[str]]) -> dict[str, list[int]]:
    """Where each node's upper left corner goes, by id."""
    places, left = {}, 0
    for column in columns:
        sizes = [measure(graph[key], object_info[graph[key]["class_type"]]) for key in column]
        top = 0
        for key, (_, height) in zip(column, sizes, strict=True):
            places[key] = [left, top]
            top += height + GAP
        left += max(width for width, _ in sizes) + GAP
    return places


def measure(entry: dict[str, Any], info: dict[str, Any]) -> tuple[int, int]:
    """Pixels across and down that a node needs in the browser; text boxes take the room of four widgets."""
    inputs = list_inputs(info)
    boxes = sum(bool(options.get("multiline")) for _, _, options in inputs)
    widgets = len(list_widget_values(entry["inputs"], info))
    sockets = sum(not is_widget(kind, options) for _, kind, options in inputs)
    width, room = ROOM.get(entry["class_type"], (WIDTH, 0))
    return width, 40 + 26 * (widgets + 3 * boxes + max(sockets, len(info["output"]))) + room


def describe_type(kind: Any) -> str:
    return "COMBO" if isinstance(kind, list) else kind


def connect(graph: Graph, nodes: dict[str, dict[str, Any]]) -> list[list]:
    """Write the graph's links into both of their ends; the list of links."""
    links: list[list] = []
    for key, entry in graph.items():
        for slot, socket in enumerate(nodes[key]["inputs"]):
            if not isinstance(source := entry["inputs"].get(socket["name"]), list):
                continue
            origin = nodes[source[0]]
            link = len(links) + 1
            links.append([link, origin["id"], source[1], int(key), slot, origin["outputs"][source[1]]["type"]])
            origin["outputs"][source[1]]["links"].append(link)
            socket["link"] = link
    return links


def to_api(ui: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """A browser's graph as the server runs it; what is bypassed is left out, and what it got is passed on.

    Raises ValueError for a node that is unknown or muted, or whose number of widget values is not the node's.
    """
    nodes = {item["id"]: item for item in ui["nodes"] if item["type"] not in NOTE_TYPES}
    links = {link[0]: link for link in ui["links"]}
    graph: Graph = {}
    for item in nodes.values():
        if item["type"] not in object_info or item["mode"] not in (0, BYPASSED):
            raise ValueError(f"Node {item['id']} ({item['type']}) is unknown to this ComfyUI or muted")
        if item["mode"] == BYPASSED:
            continue
        inputs = read_widgets(item, object_info[item["type"]])
        for socket in item["inputs"]:
            if (source := find_source(socket["link"], links, nodes)) is not None:
                inputs[socket["name"]] = source
        graph[str(item["id"])] = {"class_type": item["type"], "inputs": inputs}
    return graph


def find_source(link: int | None, links: dict[int, list], nodes: dict[int, dict[str, Any]]) -> list | None:
    """Where a link comes from, behind all bypassed nodes: these hand an output's type on from an input of that type."""
    while link is not None:
        _, origin, slot, _, _, kind = links[link]
        if nodes[origin]["mode"] != BYPASSED:
            return [str(origin), slot]
        inputs = nodes[origin]["inputs"]
        same = [socket for socket in [*inputs[slot : slot + 1], *inputs] if socket["type"] == kind]
        link = same[0]["link"] if same else None
    return None


def read_widgets(item: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Widget values of one browser node by name; raises ValueError where their number is not what the node has."""
    names: list[str | None] = []
    for name, kind, options in list_inputs(info):
        if is_widget(kind, options):
            names += [name, None] if options.get("control_after_generate") else [name]
    values = item["widgets_values"]
    if len(values) != len(names):
        raise ValueError(
            f"Node {item['id']} ({item['type']}) has {len(values)} widget values, this ComfyUI expects {len(names)}: "
            "write the graphs anew with `python -m workflows.shipping`"
        )
    return {name: value for name, value in zip(names, values, strict=True) if name}
