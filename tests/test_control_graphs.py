"""The graphs of frequency control run as they are built: nodes, inputs and links are those of a real ComfyUI."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from control_files import write_control

from workflows.control_graphs import TASKS, compare_steered, show_band, steer
from workflows.graphs import CHECKPOINT, STUDENT, Picture

MODELS = Path(__file__).resolve().parent.parent / "workflows" / "models"
SMALL = Picture("", steps=2)
DHA = {"levels": "two finest", "token_budget": 0.125, "start_percent": 0.0, "end_percent": 1.0}


def run(studio, graph):
    """Outputs of every node by id, each run once when what it needs is there; files are not written."""
    outputs = {}

    def compute(key):
        if key not in outputs:
            inputs = {
                name: compute(value[0])[value[1]] if isinstance(value, list) else value
                for name, value in graph[key]["inputs"].items()
            }
            outputs[key] = studio.host.call(graph[key]["class_type"], **inputs)
        return outputs[key]

    for key, item in graph.items():
        if item["class_type"] not in ("SaveImage", "PreviewImage"):
            compute(key)
    return outputs


@pytest.fixture(scope="module")
def tasks(studio):
    if not all((MODELS / name).is_file() for name in (f"checkpoints/{CHECKPOINT}", f"dha/{STUDENT}")):
        pytest.skip("the shipped models are not there")
    names = {band: write_control(studio, f"task-{band}", band).name for band in TASKS}
    return {band: replace(task, control=names[band]) for band, task in TASKS.items()}


@pytest.mark.parametrize("band", TASKS)
def test_each_task_draws_a_steered_picture_and_shows_its_band(studio, tasks, band):
    graph = steer(CHECKPOINT, SMALL, tasks[band])
    show_band(graph, band)
    outputs = run(studio, graph)
    assert outputs["8"][0].shape == outputs["12"][0].shape == outputs["16"][1].shape == (1, 128, 128, 3)
    free = run(studio, steer(CHECKPOINT, SMALL, tasks[band], strength=0.0))
    assert not torch.equal(outputs["7"][0]["samples"], free["7"][0]["samples"])
    assert torch.equal(outputs["11"][0]["samples"], free["11"][0]["samples"])


def test_a_student_is_steered_too(studio, tasks):
    plain, drawn = (
        run(studio, steer(CHECKPOINT, SMALL, tasks["low"], student, **settings))
        for student, settings in ((None, {}), (STUDENT, DHA))
    )
    assert not torch.equal(plain["7"][0]["samples"], drawn["7"][0]["samples"])


def test_the_comparison_holds_steered_teacher_and_steered_student_side_by_side(studio, tasks):
    studio.host.load_extra("images")
    graph = compare_steered(CHECKPOINT, SMALL, tasks["high"], STUDENT, **DHA)
    outputs = run(studio, graph)
    assert 0 < json.loads(outputs["17"][2])["relative_latent_difference"] < 1
    source, compared, joined = outputs["12"][0], outputs["22"][0], outputs["24"][0]
    assert torch.equal(joined, torch.cat([source, compared], dim=2)), "source | teacher | student | difference"
