"""The bench shares its time out, goes on where something fails, and plans what was asked for."""

import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("aiohttp", reason="the bench drives ComfyUI, whose aiohttp is not installed")
pytest.importorskip("PIL", reason="the bench draws a chart with Pillow, which is not installed")

from workflows.bench.backends import find_backends
from workflows.bench.contest import Entrant, Forecast, PairCounter, Record, hold_contest, share_time, time_lap
from workflows.bench.model import import_from_pack
from workflows.bench.report import Result, Run, summarise
from workflows.bench.schedule import LAYER_SIDES, PARTS, plan_tasks
from workflows.bench.step import Size
from workflows.bench.subjects import TITLES, choose_levels, is_wanted

CPU = torch.device("cpu")


def test_pair_counter_counts_batch_queries_and_keys_but_not_heads():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with PairCounter() as counter:
        counted = F.scaled_dot_product_attention(q, k, k)
    assert counter.pairs == 2 * 5 * 7
    assert torch.equal(counted, F.scaled_dot_product_attention(q, k, k))


def test_time_is_shared_by_weight(monkeypatch):
    monkeypatch.setattr("workflows.bench.contest.time.monotonic", lambda: 100.0)
    assert share_time([1.0, 3.0], 0, 200) == 125 and share_time([1.0, 3.0], 1, 200) == 200
    assert share_time([1.0, 3.0], 1, 50) == 100


def enter(name: str, seconds: float = 0.001, fails_at: int | None = None, **settings) -> Entrant:
    """An entrant that takes its time, and runs out of memory at its n-th run."""
    runs = []

    def run():
        runs.append(name)
        if len(runs) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        time.sleep(seconds)
        return torch.ones(2)

    return Entrant(name, name, run, family=(name,), **settings)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_what_fails_is_noted_and_the_others_go_on(fails_at):
    entrants = [enter("first", 0.3), enter("second", 0.3, fails_at), enter("third", 0.3)]
    records = hold_contest(entrants, CPU, rounds=3)
    assert records[1].error == "OutOfMemoryError: CUDA out of memory."
    assert [len(records[n].seconds) for n in (0, 2)] == [3, 3]
    summary = summarise(Run({}, {}, [Result("step", {"width": 8, "height": 8}, records)]))
    first, second, third = summary["results"][0]["subjects"]
    assert "ratio" not in second and second["error"].startswith("OutOfMemory") and third["ratio"]["median"] > 0


def test_without_the_unpatched_model_the_others_still_have_seconds_but_nothing_to_differ_from():
    records = hold_contest([enter("first", fails_at=1), enter("second", 0.3), enter("third")], CPU, rounds=1)
    first, *others = summarise(Run({}, {}, [Result("step", {}, records)]))["results"][0]["subjects"]
    assert "error" in first
    for subject in others:
        assert subject["ratio"] is None and subject["relative_difference"] is None
        assert subject["seconds"]["median"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_lap_on_a_gpu_begins_with_a_run_that_does_not_count():
    runs = []
    entrant = Entrant("ours", "ours", lambda: runs.append(torch.ones(2**20, device="cuda")) or runs[-1])
    record = Record("ours", "ours", runs_per_lap=3)
    time_lap(entrant, record, torch.device("cuda"))
    assert len(runs) == 4 and record.run_memory == 3 * 2**22


def test_where_time_is_short_the_last_ones_are_left_out():
    entrants = [enter(name, 0.2) for name in ("first", "second", "third")]
    records = hold_contest(entrants, CPU, rounds=9, deadline=time.monotonic() + 1.5)
    assert records[0].error is None and 1 <= len(records[0].seconds) < 9
    assert records[2].error.startswith("skipped: about")


def test_larger_sizes_are_forecast_from_smaller_ones():
    forecast = Forecast()
    hold_contest([enter("ours", 0.2, work=1.0)], CPU, rounds=1, forecast=forecast)
    (record,) = hold_contest([enter("ours", work=100.0)], CPU, 1, time.monotonic() + 10, forecast=forecast)
    assert record.error.startswith("skipped: about 4") and not record.seconds


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_planned_for_the_sizes_and_batches_asked_for(part):
    settings = {"sizes": [Size(512, 512), Size(1216, 832)], "batch": [1, 2], "dtype": "bf16", "mini": False}
    arguments = Namespace(**settings, parts=[part], steps=20, layer_sides=(512, 4096), checkpoint=None)
    tasks = plan_tasks(arguments, [], ["sdpa", "xformers"], torch.device("cuda"))
    labels = [(task.kind, task.labels["width"], task.labels["batch"]) for task in tasks]
    expected = {
        "step": [("step", width, batch) for batch in (1, 2) for width in (512, 1216)],
        "backends": [("step", 512, 2), ("step", 1216, 2)],
        "compile": [("step", 512, 2), ("step", 1216, 2)],
        "pictures": [("picture", 512, 2), ("picture", 1216, 2)],
        "layers": [("layer", side, 2) for _ in range(3) for side in (512, 4096)],
        "profile": [("profile", side, 2) for side in (512, 4096) for _ in range(2)],
    }
    assert labels == expected[part] and all(task.weight > 0 for task in tasks)
    if part in ("backends", "compile"):
        assert all(task.labels["backend"] == ("xformers" if part == "backends" else "sdpa") for task in tasks)


@pytest.mark.parametrize(
    ("part", "sides"), {"layers": LAYER_SIDES * 3, "profile": (512, 512, 768, 768, 1024, 1024)}.items()
)
def test_single_layers_have_sizes_of_their_own(part, sides):
    arguments = Namespace(parts=[part], dtype="bf16", batch=[1], mini=False, layer_sides=None)
    tasks = plan_tasks(arguments, [], [], CPU)
    assert tuple(task.labels["width"] for task in tasks) == sides


@pytest.mark.parametrize("suited", [True, False], ids=["suited", "not suited"])
def test_matrix_products_are_one_of_the_kernels_where_they_suit(monkeypatch, suited):
    products = import_from_pack("dha.matrix_attention")
    monkeypatch.setattr(products, "suits_products", lambda q, k, heads: suited)
    found, missing = find_backends(CPU, torch.float32)
    assert ("products" in found) is suited
    assert suited or "PyTorch's kernel" in missing["products"]


def test_subjects_are_chosen_by_name_or_family():
    chosen = [name for name in TITLES if is_wanted(name, ["dha-fast", "official"])]
    assert chosen == ["unpatched", "dha-fast", "official-0.5", "official-0.1"]


def test_where_no_layers_were_measured_presets_are_timed_at_both_finest_levels(monkeypatch, host):
    """`auto` would leave most layers there as they are, and the original would be timed under DHA's name."""
    payoff, model = import_from_pack("nodes.payoff"), SimpleNamespace(load_device=torch.device("cpu"))
    monkeypatch.setattr(payoff, "find_precision", lambda _model: torch.bfloat16)
    monkeypatch.setattr(payoff, "read_tables", dict)
    assert choose_levels(model) == "auto"
    model.load_device = torch.device("mps")
    assert choose_levels(model) == "two finest"
