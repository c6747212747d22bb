"""DHA Benchmark, its memory figures and its chart, in a real ComfyUI."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dha.peak import watch_peak
from workflows.formats import fill_defaults
from workflows.graphs import CHECKPOINT, Picture, add_student, node, prepare
from workflows.server import ServerError


def benchmark(sizes: str, **settings):
    """Node 7 is the benchmark of the original against itself, training-free."""
    graph = prepare(CHECKPOINT, Picture("owl"))
    del graph["4"]
    student = add_student(graph, None, {"levels": "two finest"})
    inputs = {"positive": ["2", 0], "negative": ["3", 0], "sizes": sizes, "steps": 1, "repeats": 1, "cfg": 1.0}
    graph["7"] = node("DHABenchmark", original=["1", 0], student=student, **{**inputs, **settings})
    graph["8"] = node("PreviewImage", images=["7", 0])
    return graph


def run(server, graph, **kwargs):
    return server.run(fill_defaults(graph, server.info), **kwargs)


def test_every_size_is_timed_and_progress_reaches_its_end(server):
    events = []
    outcome = run(server, benchmark("64, 128x64"), on_progress=lambda *event: events.append(event))
    report = json.loads(outcome.text("7"))
    assert [(size["width"], size["height"]) for size in report["sizes"]] == [(64, 64), (128, 64)]
    for size in report["sizes"]:
        assert size["speedup"] == pytest.approx(size["original"]["seconds"] / size["student"]["seconds"])
    small, large = (size["original"]["peak_memory"] for size in report["sizes"])
    assert large > 1.5 * small
    values = [(value, total) for key, value, total in events if key == "7" and total > 1]
    assert values == sorted(values) and values[-1] == (8, 8)
    rows = json.loads(outcome.outputs["7"]["table"][0])
    assert [row[0] for row in rows] == ["size", "64x64", "128x64"]


def test_the_chart_has_a_bar_for_each_model(server):
    outcome = run(server, benchmark("64"))
    chart = np.asarray(Image.open(io.BytesIO(server.fetch(outcome.images("7")[0]))))
    for colour in ((0x8A, 0x8F, 0x98), (0xE8, 0x89, 0x1C)):
        found = (chart == colour).all(-1)
        assert found[70:].sum() > 1000, "beside the legend, a bar"


def test_the_same_graph_measures_again(server):
    first, second = (json.loads(run(server, benchmark("64")).text("7")) for _ in range(2))
    assert first["sizes"][0]["original"]["seconds"] != second["sizes"][0]["original"]["seconds"]


@pytest.mark.parametrize("sizes", ["", "abc", "100", "64x", "32", "9000", "64 128", "-64"])
def test_wrong_sizes_are_explained(server, sizes):
    with pytest.raises(ServerError, match="DHA Benchmark found .*(expected|enter)"):
        run(server, benchmark(sizes))


def test_cancel_stops_it(server):
    def cancel(key, value, total):
        if key == "7" and value == 3:
            server.interrupt()

    with pytest.raises(ServerError, match="cancelled in DHABenchmark"):
        run(server, benchmark("64", steps=100, repeats=20), on_progress=cancel)


def measure(work) -> float:
    """Peak in units of 1 MiB."""
    with torch.inference_mode(), watch_peak(torch.device("cpu")) as peak:
        work()
    return peak.bytes / 2**20


def test_peak_memory_is_that_of_tensors_alive_at_once():
    def work():
        first = torch.zeros(2**18)
        second = torch.zeros(2**19)
        del second
        third = torch.zeros(2**18)
        return first, third

    assert measure(work) == pytest.approx(3)


def test_views_and_changes_in_place_take_no_memory():
    outside = torch.zeros(2**18)

    def work():
        outside.view(-1, 2).transpose(0, 1)[0].add_(1)

    assert measure(work) == 0


def test_weights_of_a_student_are_counted(studio, student, module):
    count_weights = module("timing").count_weights
    alone, both = count_weights(studio.model), count_weights(studio.apply(student=student))
    assert both - alone == student.patcher.model_size() > 0


NO_ROOM = {
    "cuda": lambda: raise_error(torch.cuda.OutOfMemoryError("Allocation on device")),
    "cpu": lambda: torch.empty(2**60),
    "windows": lambda: raise_error(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9")),
    "mps": lambda: raise_error(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9 GB)")),
    "one tensor on mps": lambda: raise_error(RuntimeError("Invalid buffer size: 32.00 GB")),
}


def raise_error(error):
    raise error


@pytest.mark.parametrize("fail", NO_ROOM.values(), ids=NO_ROOM)
def test_a_size_that_does_not_fit_is_left_out(pack, monkeypatch, fail):
    """The other sizes are still measured; the chart and the table say which one was too large."""
    module = sys.modules[f"{pack.__name__}.nodes.benchmark"]
    monkeypatch.setattr(module, "time_both", lambda *_: fail())
    size = module.time_size(None, {}, module.make_latent(128, 64, 1), 1, None)
    assert size == {"width": 128, "height": 64, "error": "out of memory"}
    report = {"sizes": [size]}
    assert module.tabulate(report)[1][1] == "out of memory"
    assert module.summarise(report) == "no size fitted into the memory"
    module.draw_bars(report["sizes"], "title")


def test_another_error_is_not_taken_for_a_size_that_does_not_fit(pack, monkeypatch):
    module = sys.modules[f"{pack.__name__}.nodes.benchmark"]
    monkeypatch.setattr(module, "time_both", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        module.time_size(None, {}, module.make_latent(128, 64, 1), 1, None)
