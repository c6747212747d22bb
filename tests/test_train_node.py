"""DKD Train in a real ComfyUI: it trains, is cancelled, killed and orphaned, and the same graph goes on."""

import json
import os
from pathlib import Path

import psutil
import pytest
from PIL import Image

from dha.checkpoint import load_student
from workflows.formats import fill_defaults
from workflows.graphs import CHECKPOINT, FOLDER, Picture, add_student, draw, node
from workflows.server import ServerError, find_comfyui, serve

ROOT = Path(__file__).resolve().parent.parent
LONG = {"data_folder": "pairs", "steps": 240, "batch": 1}


def write_pairs(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in ("red", "green", "blue", "yellow"):
        Image.new("RGB", (128, 128), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"{colour} picture")
    return folder


def train(name: str, **settings):
    """Node 5 trains, nodes 6 to 9 draw with its student."""
    graph = draw(CHECKPOINT, Picture("owl", steps=1))
    graph["7"]["inputs"]["model"] = add_student(graph, None, {"levels": "two finest"})
    models = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph["5"] = node("DKDTrain", **models, **{"name": name, "preset": "mini", **settings})
    graph["6"]["inputs"]["student"] = ["5", 0]
    return graph


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a ComfyUI with four pictures in its input folder."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if not (FOLDER / "models" / "checkpoints" / CHECKPOINT).is_file():
        pytest.skip(f"{CHECKPOINT} is not there")

    def build():
        base = tmp_path_factory.mktemp("comfyui")
        write_pairs(base / "input" / "pairs")
        return base, serve(find_comfyui(None), base)

    return build


@pytest.fixture(scope="module")
def server(start):
    base, starting = start()
    with starting as running:
        running.info, running.base = running.get("/object_info"), base
        yield running


def run(server, graph, act=None, after=1):
    """Run a graph, call `act` once when the training has come to step `after`; returns the outcome and the progress."""
    seen = []

    def note(key, value, total):
        if key == "5" and total:
            seen.append((value, total))
            if act and value >= after:
                acts.pop()() if acts else None

    acts = [act] if act else []
    return server.run(fill_defaults(graph, server.info), on_progress=note), seen


def find_trainers(server) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if "dkd_trainer" in child.cmdline()]


def find_run(base: Path, name: str) -> Path:
    (folder,) = (each for each in (base / "output" / "dkd" / name).iterdir() if each.name != "cache")
    return folder


def read_journal(folder: Path, event: str) -> list[dict]:
    entries = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["event"] == event]


def test_a_graph_trains_a_student_from_prompts_and_draws_with_it(server):
    prompts = "\n".join(f"duck, flat style, {colour} background" for colour in ["pink", "white", "gray", "red"] * 2)
    graph = train("fresh", prompts=prompts, steps=4)
    outcome, seen = run(server, graph)
    assert seen[-1] == (4, 4)
    installed = server.base / "models" / "dha" / "fresh.safetensors"
    assert load_student(installed).config.levels == (0,)
    assert len(outcome.images("9")) == 1
    sizes = [Image.open(server.base / "temp" / shown["filename"]).size for shown in outcome.images("5")]
    assert sizes == [(960, 540), (128, 384)], "the curve, and one held-out prompt as teacher, student, difference"
    report = json.loads(outcome.text("5"))
    assert report["trained_now"] and report["steps"] == 4 and report["pairs"] == 8
    folder = find_run(server.base, "fresh")
    assert not (folder / "teacher.safetensors").exists()

    written = installed.stat().st_mtime_ns, (folder / "fresh.safetensors").stat().st_mtime_ns
    graph["5"]["inputs"]["prompts"] += "\n\n"  # ComfyUI sees another text and asks the node again
    outcome, seen = run(server, graph)
    assert not json.loads(outcome.text("5"))["trained_now"]
    assert "Nothing has changed" in outcome.outputs["5"]["summary"][0]
    assert written == (installed.stat().st_mtime_ns, (folder / "fresh.safetensors").stat().st_mtime_ns)

    shown = server.run({"1": node("DKDTrainingRecord", training=f"fresh/{folder.name}")})
    record = json.loads(shown.text("1"))
    assert record["state"] == "finished" and record["pairs"] == report["pairs"]
    drawn, before = (
        [Image.open(server.base / "temp" / entry["filename"]).tobytes() for entry in images]
        for images in (shown.images("1"), outcome.images("5"))
    )
    assert drawn == before


def test_no_input_changes_by_itself_between_two_runs(server):
    """The browser gives a widget called `seed` or `noise_seed` a new value after each run: nothing would go on."""
    inputs = {**server.info["DKDTrain"]["input"]["required"], **server.info["DKDTrain"]["input"]["optional"]}
    assert not {"seed", "noise_seed"} & set(inputs)
    assert not any(options[1].get("control_after_generate") for options in inputs.values())


def test_cancel_saves_and_the_same_graph_goes_on(server):
    graph = train("cancelled", **LONG)
    with pytest.raises(ServerError, match="cancelled in DKDTrain"):
        run(server, graph, server.interrupt)
    folder = find_run(server.base, "cancelled")
    (stop,) = read_journal(folder, "stop")
    assert (folder / f"state-{stop['step']:08d}.pt").is_file() and 0 < stop["step"] < LONG["steps"]
    assert not find_trainers(server)
    run(server, graph)
    assert [entry["step"] for entry in read_journal(folder, "start")] == [0, stop["step"]]
    assert (server.base / "models" / "dha" / "cancelled.safetensors").is_file()


def test_a_killed_trainer_is_explained_and_the_same_graph_goes_on(server):
    graph = train("killed", **LONG)

    def kill():
        (trainer,) = find_trainers(server)
        trainer.kill()

    with pytest.raises(ServerError, match="(?s)Queue again to go on .*killed.*memory.*distil"):
        run(server, graph, kill, after=110)
    folder = find_run(server.base, "killed")
    assert (folder / "state-00000100.pt").is_file() and not (folder / "killed.safetensors").exists()
    _, seen = run(server, graph)
    assert seen[-1] == (LONG["steps"], LONG["steps"])
    assert read_journal(folder, "start")[-1]["step"] >= 100


def test_a_mistake_of_the_data_is_what_the_message_begins_with(server):
    (server.base / "input" / "bare").mkdir()
    with pytest.raises(ServerError, match="DKD Train: .*bare holds no usable pair"):
        run(server, train("bare", data_folder="bare", steps=2))


def test_no_trainer_is_left_when_comfyui_is_killed(start):
    base, starting = start()
    with starting as server:
        server.info = server.get("/object_info")
        trainers = []

        def kill():
            trainers.extend(find_trainers(server))
            server.process.kill()

        with pytest.raises(ServerError, match="ended with exit status"):
            run(server, train("orphan", **LONG), kill)
        (trainer,) = trainers
        _, alive = psutil.wait_procs([trainer], timeout=60)
        assert not alive
    assert read_journal(find_run(base, "orphan"), "stop")
