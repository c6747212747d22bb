"""Run times of the shipped workflows: each is its own, and what is written says where and with what it was taken."""

import json
import os

import pytest

pytest.importorskip("aiohttp", reason="workflows run in ComfyUI, whose aiohttp is not installed")

from workflows.formats import to_api
from workflows.graphs import CHECKPOINT, FOLDER
from workflows.machine import Machine
from workflows.run_times import make_own, write_times
from workflows.server import find_comfyui, serve

MACHINE = Machine("a processor", 2, "cpu", "0.3.75", "2.13", "3.11", "abc", "python -m workflows.shipping --thumbnails")


WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_both_files_have_every_workflow_and_the_command(tmp_path):
    write_times(tmp_path / "results", {name: number + 0.14159 for number, name in enumerate(WORKFLOWS)}, MACHINE)
    figures = json.loads((tmp_path / "results" / "run-times.json").read_text())
    assert figures["seconds"] == {name: number + 0.1 for number, name in enumerate(WORKFLOWS)}
    assert figures["machine"]["command"] == MACHINE.command
    text = (tmp_path / "results" / "run-times.md").read_text()
    rows = [f"| {name} | {number}.1 |" for number, name in enumerate(WORKFLOWS)]
    for part in (*rows, "a processor, 2 cores", MACHINE.command, "abc"):
        assert part in text


def test_the_shipped_run_times_are_those_of_the_shipped_workflows():
    folder = FOLDER / "results"
    seconds = json.loads((folder / "run-times.json").read_text())["seconds"]
    assert sorted(seconds) == WORKFLOWS
    assert all(f"| {name} | {taken:.1f} |" in (folder / "run-times.md").read_text() for name, taken in seconds.items())


def test_a_timed_workflow_takes_nothing_over_from_another(tmp_path):
    if not os.environ.get("COMFYUI_PATH") or not (FOLDER / "models" / "checkpoints" / CHECKPOINT).is_file():
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI, or the mini checkpoint is not there")
    with serve(find_comfyui(None), tmp_path) as server:
        graph = to_api(json.loads((FOLDER / "smallest.json").read_text()), server.get("/object_info"))

        def count_cached(mark: str) -> int:
            before = server.get("/history").keys()
            server.run(make_own(graph, mark))
            (ended,) = server.get("/history").keys() - before
            messages = dict(server.get(f"/history/{ended}")[ended]["status"]["messages"])
            return len(messages["execution_cached"]["nodes"])

        assert count_cached("one") == 0 == count_cached("another")
        assert count_cached("another") == len(graph), "the host does keep results"
