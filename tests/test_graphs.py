"""UI format and API format into each other, on a hand-written list of nodes."""

import copy

import pytest

from workflows.formats import fill_defaults, to_api, to_ui

INFO = {
    "Loader": {
        "input": {"required": {"name": [["a.safetensors", "b.safetensors"]]}},
        "output": ["MODEL", "CLIP"],
        "output_name": ["MODEL", "CLIP"],
    },
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "kind": ["COMBO", {"options": ["euler", "heun"]}],
            },
            "optional": {"scale": ["FLOAT", {"default": 2.5}], "report": ["STRING", {"forceInput": True}]},
        },
        "output": ["LATENT"],
        "output_name": ["LATENT"],
    },
}
GRAPH = {
    "1": {"class_type": "Loader", "inputs": {"name": "b.safetensors"}},
    "2": {"class_type": "Sampler", "inputs": {"model": ["1", 0], "seed": 7, "kind": "heun"}},
}


def write_ui():
    return to_ui(GRAPH, INFO, [["1"], ["2"]], "read me", {"2": "My sampler"})


def test_round_trip_with_defaults():
    assert to_api(write_ui(), INFO) == fill_defaults(GRAPH, INFO)
    assert fill_defaults(GRAPH, INFO)["2"]["inputs"]["scale"] == 2.5


def test_widgets_and_links_are_the_browsers():
    ui = write_ui()
    sampler = next(item for item in ui["nodes"] if item["type"] == "Sampler")
    assert sampler["title"] == "My sampler"
    assert sampler["widgets_values"] == [7, "fixed", "heun", 2.5]
    assert [socket["name"] for socket in sampler["inputs"]] == ["model", "report"]
    assert ui["links"] == [[1, 1, 0, 2, 0, "MODEL"]]
    assert len({item["id"] for item in ui["nodes"]}) == 3 and ui["last_node_id"] == 3


def test_nodes_do_not_lie_on_each_other():
    ui = to_ui(GRAPH, INFO, [["1", "2"]], "read me")
    boxes = [(*item["pos"], *item["size"]) for item in ui["nodes"]]
    for number, (left, top, width, height) in enumerate(boxes):
        for x, y, _, _ in boxes[number + 1 :]:
            assert not (left <= x < left + width and top <= y < top + height)


def test_what_is_bypassed_hands_its_input_on():
    info = INFO | {
        "Patch": {"input": {"required": {"model": ["MODEL"]}}, "output": ["MODEL"], "output_name": ["MODEL"]}
    }
    graph = copy.deepcopy(GRAPH) | {"3": {"class_type": "Patch", "inputs": {"model": ["1", 0]}}}
    graph["2"]["inputs"]["model"] = ["3", 0]
    columns = [["1"], ["3"], ["2"]]
    assert to_api(to_ui(graph, info, columns, ""), info)["2"]["inputs"]["model"] == ["3", 0]
    bypassed = to_api(to_ui(graph, info, columns, "", bypassed={"3"}), info)
    assert bypassed == fill_defaults(GRAPH, INFO)


def test_what_depends_on_a_bypassed_loader_goes_without():
    ui = to_ui(GRAPH, INFO, [["1"], ["2"]], "", bypassed={"1"})
    assert "model" not in to_api(ui, INFO)["2"]["inputs"]


@pytest.mark.parametrize("damage", ["values", "type", "mute"])
def test_what_cannot_be_run_is_refused(damage):
    ui = copy.deepcopy(write_ui())
    sampler = next(item for item in ui["nodes"] if item["type"] == "Sampler")
    if damage == "values":
        sampler["widgets_values"].append(1)
    elif damage == "type":
        sampler["type"] = "Reroute"
    else:
        sampler["mode"] = 2
    with pytest.raises(ValueError, match=r"Node 2 \((Sampler|Reroute)\)"):
        to_api(ui, INFO)
