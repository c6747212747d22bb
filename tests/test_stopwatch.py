"""Seconds of the work that a device was given, not of giving it."""

import pytest
import torch

from dha import stopwatch


@pytest.fixture
def waits(monkeypatch) -> list:
    """What each kind of device was asked to wait for."""
    calls: list = []
    for kind in ("cpu", "cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *args, kind=kind: calls.append((kind, *args)))
    return calls


@pytest.mark.parametrize("name", ["cpu", "cuda:0", "cuda:1"])
def test_the_very_device_that_was_used_is_waited_for(waits, name):
    stopwatch.synchronise(torch.device(name))
    assert waits == [(torch.device(name).type, torch.device(name))]


def test_apples_gpu_is_the_only_one_of_its_kind(waits):
    stopwatch.synchronise(torch.device("mps"))
    assert waits == [("mps",)]


def test_a_device_whose_work_is_not_queued_needs_no_waiting():
    stopwatch.synchronise(torch.device("meta"))


def test_a_run_is_timed_from_idle_to_idle(monkeypatch):
    now, queued = [0.0], [5.0]

    def finish(device):
        now[0] += queued[0]
        queued[0] = 0.0

    def run():
        queued[0] += 2.0

    monkeypatch.setattr(torch.cpu, "synchronize", finish)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    assert stopwatch.time_runs(run, torch.device("cpu"), 3) == pytest.approx(2.0)


@pytest.mark.parametrize(("seconds", "runs"), [(0.03, 4), (0.05, 2), (0.2, 1), (1e-5, 100), (0.0, 100)])
def test_a_lap_is_as_many_runs_as_fill_it(seconds, runs):
    assert stopwatch.fill_lap(seconds, 0.1, 100) == runs
