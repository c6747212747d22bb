"""Graphs as the browser keeps them (UI format) and as the server runs them (API format), both ways."""

from typing import Any

from .server import Graph

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTE_TYPES = {"Note", "MarkdownNote"}
COLUMN, ROW = 340, 60
PICTURE_HEIGHT = {"PreviewImage": 280, "SaveImage": 280, "ComparePictures": 120, "PreviewAny": 180}


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


def to_ui(graph: Graph, object_info: dict[str, Any], places: dict[str, tuple[int, int]], note: str) -> dict[str, Any]:
    """A graph for the browser, from API format; `places` are columns and rows by node id."""
    graph = fill_defaults(graph, object_info)
    nodes: dict[str, dict[str, Any]] = {}
    for order, (key, entry) in enumerate(graph.items()):
        info = object_info[entry["class_type"]]
        column, row = places[key]
        widgets = list_widget_values(entry["inputs"], info)
        wanted = [item for item in list_inputs(info) if not is_widget(*item[1:])]
        nodes[key] = {
            "id": int(key),
            "type": entry["class_type"],
            "pos": [COLUMN * column, ROW * row],
            "size": [
                300,
                estimate_height(info, len(widgets), len(wanted)) + PICTURE_HEIGHT.get(entry["class_type"], 0),
            ],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [{"name": name, "type": describe_type(kind), "link": None} for name, kind, _ in wanted],
            "outputs": [
                {"name": name, "type": describe_type(kind), "links": []}
                for name, kind in zip(info["output_name"], info["output"], strict=True)
            ],
            "properties": {"Node name for S&R": entry["class_type"]},
            "widgets_values": widgets,
        }
    links = connect(graph, nodes)
    last = max(int(key) for key in graph) + 1
    text = {"id": last, "type": "MarkdownNote", "pos": [0, -300], "size": [640, 260], "widgets_values": [note]}
    text |= {"flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    ui = {"last_node_id": last, "last_link_id": len(links), "nodes": [*nodes.values(), text], "links": links}
    return ui | {"groups": [], "config": {}, "extra": {}, "version": 0.4}


def estimate_height(info: dict[str, Any], widgets: int, sockets: int) -> int:
    """Pixels that a node needs in the browser; text boxes take the room of four widgets."""
    boxes = sum(bool(options.get("multiline")) for _, _, options in list_inputs(info))
    return 40 + 26 * (widgets + 3 * boxes + max(sockets, len(info["output"])))


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
    """A browser's graph as the server runs it.

    Raises ValueError for a node that is unknown, muted or bypassed, or whose number of widget values is not the node's.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    graph: Graph = {}
    for item in ui["nodes"]:
        if item["type"] in NOTE_TYPES:
            continue
        if item["type"] not in object_info or item["mode"] != 0:
            raise ValueError(f"Node {item['id']} ({item['type']}) is unknown to this ComfyUI, muted or bypassed")
        inputs = read_widgets(item, object_info[item["type"]])
        for socket in item["inputs"]:
            if socket["link"] is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        graph[str(item["id"])] = {"class_type": item["type"], "inputs": inputs}
    return graph


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
            "write the graphs anew with `python -m workflows.graphs`"
        )
    return {name: value for name, value in zip(names, values, strict=True) if name}
