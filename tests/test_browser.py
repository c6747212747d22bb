"""The shipped workflows in ComfyUI's real frontend, in a real browser.

With DHA_SCREENSHOTS=FOLDER the screenshots of the README are written there.
"""

import json
import os
from pathlib import Path

import pytest

from workflows.formats import to_api
from workflows.graphs import FOLDER
from workflows.server import choose_device_flags, find_comfyui, serve

pytest.importorskip("playwright", reason="comes with `python3 install.py --test`")
from workflows.browser import browse, find_chromium

WORKFLOWS = sorted(path.name for path in FOLDER.glob("*.json"))
FLAGS = (*choose_device_flags(), "--preview-method", "latent2rgb")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if not find_chromium():
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with serve(find_comfyui(None), tmp_path_factory.mktemp("comfyui"), flags=FLAGS) as running:
        running.info = running.get("/object_info")
        yield running


@pytest.fixture(scope="module")
def frontend(server):
    with browse(server, find_chromium()) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quiet(frontend):
    """Whatever a test does: no error in the console, and nothing asked of another machine."""
    yield
    errors, left = frontend.errors[:], frontend.left[:]
    frontend.errors.clear(), frontend.left.clear()
    assert not errors and not left


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


def shoot(frontend, name: str) -> None:
    if folder := os.environ.get("DHA_SCREENSHOTS"):
        frontend.shoot(Path(folder) / f"{name}.jpg")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_survives_the_frontend(server, frontend, name):
    """What the frontend sends to the server is what the file says, also after saving and opening once more."""
    expected = to_api(read(name), server.info)
    frontend.load(read(name))
    saved = frontend.serialise()
    frontend.load(saved)
    for graph in (to_api(saved, server.info), strip(frontend.export())):
        assert graph == expected


def strip(graph: dict) -> dict:
    return {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in graph.items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs(frontend, name):
    frontend.load(read(name))
    frontend.queue()
    assert frontend.finish() == "execution_success", frontend.server.read_log()
    kinds = {kind for kind, _ in frontend.seen()}
    assert {"progress", "executed"} <= kinds
    shoot(frontend, name.removesuffix(".json"))


def test_cancel(frontend):
    """The frontend's own cancel stops the sampling, and what is queued next runs."""
    workflow = read("smallest.json")
    sampler = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] = 5000
    frontend.load(workflow)
    frontend.queue()
    frontend.wait("progress")
    frontend.wait("preview")
    shoot(frontend, "running")
    frontend.command("Comfy.Interrupt")
    assert frontend.finish() == "execution_interrupted"
    frontend.load(read("smallest.json"))
    frontend.queue()
    assert frontend.finish() == "execution_success"
