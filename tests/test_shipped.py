"""What comes with the nodes: workflows, thumbnails, help pages and the locale are those of the nodes as they are."""

import json
import os
import re

import pytest
from PIL import Image
from safetensors import safe_open

from workflows.formats import to_api
from workflows.graphs import CHECKPOINT, FOLDER
from workflows.server import PACK, find_comfyui, serve
from workflows.shipping import build_workflows
from workflows.words import build_files, pick_ours

WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
MODELS = sorted((FOLDER / "models").glob("dha*/*.safetensors"))
PLACE = re.compile(r"(?<![\w.])(?:/\w|~/|[A-Za-z]:[\\/])")  # where an absolute path begins


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    with serve(find_comfyui(None), tmp_path_factory.mktemp("comfyui")) as running:
        running.info = running.get("/object_info")
        yield running


def test_workflows_are_up_to_date(server):
    built = build_workflows(server.info)
    assert sorted(built) == WORKFLOWS
    stale = [name for name in WORKFLOWS if json.loads((FOLDER / f"{name}.json").read_text()) != built[name]]
    assert not stale, "write them anew: python -m workflows.shipping"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_a_thumbnail_and_needs_no_other_pack(server, name):
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert thumbnail.width == thumbnail.height >= 256
    kinds = {
        entry["class_type"] for entry in to_api(json.loads((FOLDER / f"{name}.json").read_text()), server.info).values()
    }
    ours = set(pick_ours(server.info))
    assert kinds & ours
    assert all(server.info[kind]["python_module"].startswith(("nodes", "comfy_extras.")) for kind in kinds - ours)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_says_what_to_change_for_the_real_model(name):
    nodes = json.loads((FOLDER / f"{name}.json").read_text())["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    for word in ("v2-1_512-ema-pruned.safetensors", "sd2-community", "models/checkpoints", "Load DHA Student"):
        assert word in note


def test_the_smallest_workflow_runs(server):
    if not (FOLDER / "models" / "checkpoints" / CHECKPOINT).is_file():
        pytest.skip(f"{CHECKPOINT} is not there")
    outcome = server.run(to_api(json.loads((FOLDER / "smallest.json").read_text()), server.info))
    assert len(outcome.images("9")) == 1


def find_record_faults(text: str, training: dict) -> list[str]:
    """What is wrong with the record beside a model whose own metadata say `training`."""
    record = json.loads(text)
    faults = [f"{name} is another than the model's" for name, value in training.items() if record.get(name) != value]
    if not isinstance(record.get("seconds"), (int, float)) or record["seconds"] <= 0:
        faults.append("seconds is no time")
    if not record.get("command", "").startswith("python -m dkd_trainer"):
        faults.append("command is none of the trainer")
    return faults + [f"names a place: {text[m.start() :][:20]!r}" for m in PLACE.finditer(text)]


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_what_stands_beside_a_model_is_its_own_and_names_no_place(model):
    """Settings as TOML are there for every model; the record of its training may be."""
    settings, record = model.with_suffix(".toml"), model.with_suffix(".json")
    assert not PLACE.search(settings.read_text(encoding="utf-8"))
    with safe_open(model, "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["run"]
    if record.is_file():
        assert find_record_faults(record.read_text(encoding="utf-8"), training) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"seconds": "1.5"}, "seconds"),
        ({"run": {"steps": 2}}, "run is another"),
        ({"command": "python -m dkd_trainer --out s.safetensors --set data.cache=/home/me/cache"}, "names a place"),
        ({"command": "train.sh"}, "command"),
    ],
)
def test_a_wrong_record_is_found(change, fault):
    good = {"command": "python -m dkd_trainer --data ../pairs/train", "seconds": 1.5, "run": {"steps": 1}}
    faults = find_record_faults(json.dumps({**good, **change}), {"run": {"steps": 1}})
    assert [fault in found for found in faults] == ([True] if fault else [])


def test_locale_and_help_pages_are_up_to_date(server):
    files = build_files(pick_ours(server.info), PACK)
    stale = [name for name, text in files.items() if (PACK / name).read_text(encoding="utf-8") != text]
    assert not stale, "write them anew: python -m workflows.words"


def test_every_input_and_output_is_explained(server):
    for name, info in pick_ours(server.info).items():
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        silent = [key for key, spec in inputs.items() if not spec[1].get("tooltip")]
        assert info["description"] and not silent, f"{name}: {silent}"


def test_names_follow_the_conventions(server):
    for name, info in pick_ours(server.info).items():
        assert info["category"].split("/")[0] == "DHA" and name.isidentifier()
        assert info["display_name"] == info["display_name"].strip() and info["display_name"][0].isupper()


def test_nothing_in_the_log_looks_like_an_error(server):
    """ComfyUI's own lines about packages that this test host leaves out are not ours."""
    lines = [line for line in server.read_log(10_000).splitlines() if "dha" in line.lower()]
    assert not [line for line in lines if any(word in line.lower() for word in ("error", "warn", "traceback", "fail"))]
