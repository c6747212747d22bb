"""The shipped workflows in ComfyUI's real frontend, in a real browser.

With DHA_SCREENSHOTS=FOLDER the screenshots of the README are written there.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_training_record import write_training

from workflows.formats import to_api, to_ui
from workflows.graphs import CHECKPOINT, FOLDER, node
from workflows.server import choose_device_flags, find_comfyui, serve

pytest.importorskip("playwright", reason="comes with `python3 install.py --test`")
from workflows.browser import browse, find_chromium
from workflows.words import pick_ours

WORKFLOWS = sorted(path.name for path in FOLDER.glob("*.json"))
FLAGS = (*choose_device_flags(), "--preview-method", "latent2rgb")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if not find_chromium():
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    comfyui, base = find_comfyui(None), tmp_path_factory.mktemp("comfyui")
    # Comes with ComfyUI, and is what Load Image shows until another picture is chosen.
    (base / "input").mkdir()
    shutil.copy(comfyui / "input" / "example.png", base / "input")
    with serve(comfyui, base, flags=FLAGS) as running:
        running.info, running.base = running.get("/object_info"), base
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


def shoot(frontend, name: str, box=None) -> None:
    if folder := os.environ.get("DHA_SCREENSHOTS"):
        frontend.shoot(Path(folder) / f"{name}.jpg", box)


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


def test_compare_pictures_shows_both_pictures_in_one_place(frontend):
    """Slider, A/B and difference; the figures as a table, and as the JSON file that the button saves."""
    page = frontend.page
    frontend.load(read("compare-quality.json"))
    frontend.queue()
    assert frontend.finish() == "execution_success"
    frontend.zoom("DHAComparePictures")
    student = page.locator(".dha-over")
    stage = page.locator(".dha-stage").bounding_box()
    # From the node's title to the picture, without the seconds below it: those of so small a picture say nothing.
    box = {"x": stage["x"] - 16, "y": stage["y"] - 160, "width": stage["width"] + 32, "height": stage["height"] + 168}
    for part in (0.25, 0.75):
        page.mouse.move(stage["x"] + part * stage["width"], stage["y"] + stage["height"] / 2)
        clipped = student.evaluate("picture => parseFloat(picture.style.clipPath.split(' ').at(-1))")
        assert clipped == pytest.approx(100 * part, abs=1)
    assert student.evaluate("picture => picture.complete && picture.naturalWidth") == 128
    shoot(frontend, "slider", box)
    page.get_by_role("button", name="A/B").click()
    assert not student.is_visible()
    page.locator(".dha-stage").click()
    assert student.is_visible()
    page.get_by_role("button", name="Difference").click()
    assert not student.is_visible() and page.locator(".dha-label").inner_text() == "difference"
    shoot(frontend, "difference", box)
    assert "PSNR" in page.locator(".dha-table").last.inner_text()
    assert save_json(page)["psnr"] > 0


def save_json(page) -> dict:
    """What the button of the last node that has one saves."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save JSON").last.click()
    return json.loads(Path(download.value.path()).read_text())


def test_a_training_is_shown_with_its_figures(server, frontend):
    write_training(server.base / "output" / "dkd" / "owl" / "0123", end="end")
    graph = {"1": node("DKDTrainingRecord", training="owl/0123")}
    frontend.load(to_ui(graph, server.get("/object_info"), [["1"]], "A training's record."))
    frontend.queue()
    assert frontend.finish() == "execution_success"
    frontend.zoom("DKDTrainingRecord")
    assert frontend.page.locator(".dha-summary").inner_text().startswith("finished: imitation 10/10")
    assert "held-out error" in frontend.page.locator(".dha-table").inner_text()
    assert save_json(frontend.page)["training"] == "owl/0123"


def test_measured_layers_are_shown_as_a_table(server, frontend):
    graph = {"1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}
    graph["2"] = node("DHAMeasureLayers", model=["1", 0], sizes="128, 256", pictures=1)
    frontend.load(to_ui(graph, server.get("/object_info"), [["1"], ["2"]], "What pays here."))
    frontend.queue()
    assert frontend.finish() == "execution_success"
    frontend.zoom("DHAMeasureLayers")
    table = frontend.page.locator(".dha-table").inner_text()
    assert "128x128" in table and "finest" in table and "balanced" in table
    assert frontend.page.locator(".dha-summary").inner_text().startswith("kept; balanced pays at 128x128: ")
    assert frontend.page.get_by_role("button", name="Save JSON").last.is_visible()
    shoot(frontend, "measure-layers")
    assert len(save_json(frontend.page)["layers"]) > 6


def test_every_node_has_a_help_page(server, frontend):
    frontend.page.evaluate("() => window.app.graph.clear()")
    for kind, info in pick_ours(server.info).items():
        frontend.add(kind)
        text = frontend.open_help(kind)
        assert info["display_name"] in text and "Inputs" in text
        if kind == "ApplyDHA":
            shoot(frontend, "help")


def test_the_template_browser_lists_the_workflows(frontend):
    frontend.open_templates()
    names = [name.removesuffix(".json") for name in WORKFLOWS]
    cards = {name: frontend.page.get_by_test_id(f"template-workflow-{name}") for name in names}
    for card in cards.values():
        card.scroll_into_view_if_needed()
        picture = card.locator("img").first
        picture.wait_for()
        frontend.page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
    shoot(frontend, "templates")
    frontend.page.evaluate("() => window.app.graph.clear()")
    cards["smallest"].click()
    frontend.page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'ApplyDHA')")


def test_the_server_has_nothing_to_complain_of(server):
    """What all the runs above left in the log that a user would take for an error; its start is ComfyUI's own."""
    _, queued, log = server.log.read_text(errors="replace").partition("got prompt")
    if not queued:
        pytest.skip("nothing was run")
    words = ("error", "warn", "traceback", "fail", "deprecat")
    assert not [line for line in log.splitlines() if any(word in line.lower() for word in words)]
