"""The speed bench on the mini architecture: every subject computes what its name says, and the report says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("aiohttp", reason="the bench drives ComfyUI, whose aiohttp is not installed")
pytest.importorskip("PIL", reason="the bench draws a chart with Pillow, which is not installed")

from dha.config import DHAConfig
from dha.patch import count_keys
from dha.sites import SITES, Architecture
from dha.student import Student
from workflows.bench.report import Run, summarise, write_markdown, write_report
from workflows.bench.timing import PairCounter, Record, Size, SizeResult, share_time

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")
needs_comfyui = pytest.mark.skipif(
    not (Path(COMFYUI) / "comfy" / "sd.py").is_file() or not COMFYUI,
    reason="COMFYUI_PATH does not point to a ComfyUI",
)
SUBJECTS = ["unpatched", "dha-0.125", "student-0.125", "tome", "hypertile", "kv2", "ceiling"]
WIDTH, HEIGHT, TEXT = 512, 256, 77


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder that a run of the bench left, from a command without ComfyUI on its path."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "workflows.bench", "--mini", "--sizes", f"{WIDTH}x{HEIGHT}", "--rounds", "2"]
    command += ["--device", "cpu", "--comfyui", COMFYUI, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def document(out) -> dict:
    return json.loads((out / "speed-mini-cpu-fp32.json").read_text())


def count_pairs(keys_of_level) -> int:
    """Query-key pairs of a step, `keys_of_level(level, tokens)` keys for each query, text included."""
    pairs = 0
    for site in SITES:
        tokens = (HEIGHT // 8 >> site.level) * (WIDTH // 8 >> site.level)
        pairs += tokens * (keys_of_level(site.level, tokens) + TEXT)
    return pairs


def count_dha_pairs(config: DHAConfig) -> int:
    """Pairs of a student's plan, from the library rather than from the bench."""
    architecture = Architecture({site.name: 32 for site in SITES}, 128, 128)
    student = Student(config, architecture)

    def count(level: int, tokens: int) -> int:
        plan = student.plan(HEIGHT // 8 >> level, WIDTH // 8 >> level, 0.125)
        return count_keys(plan, student) if level in config.levels else tokens

    return count_pairs(count)


@needs_comfyui
def test_every_subject_computes_the_attention_that_its_name_promises(document):
    found = {subject["name"]: subject["attention_pairs"] for subject in document["sizes"][0]["subjects"]}
    halved = count_pairs(lambda level, tokens: tokens if level else tokens // 2)
    assert found == {
        "unpatched": count_pairs(lambda level, tokens: tokens),
        "dha-0.125": count_dha_pairs(DHAConfig(levels=(0, 1))),
        "student-0.125": count_dha_pairs(DHAConfig(levels=(0, 1), memory=16, rank=8, router_width=64)),
        "tome": halved,
        "hypertile": halved,
        "kv2": count_pairs(lambda level, tokens: tokens if level else tokens // 4),
        "ceiling": count_pairs(lambda level, tokens: 0),
    }
    assert found["dha-0.125"] < found["student-0.125"] < 0.3 * found["unpatched"]


@needs_comfyui
def test_subjects_differ_from_the_unpatched_model_and_have_figures(document):
    size = document["sizes"][0]
    assert (size["width"], size["height"], size["tokens"], size["rounds"]) == (WIDTH, HEIGHT, 2048, 2)
    assert [subject["name"] for subject in size["subjects"]] == SUBJECTS
    unpatched = size["subjects"][0]
    assert unpatched["relative_difference_to_unpatched"] == 0
    assert unpatched["ratio_to_unpatched"]["median"] == 1
    for subject in size["subjects"]:
        laps, ratio = subject["laps_seconds_per_step"], subject["ratio_to_unpatched"]
        assert len(laps) == 2 and min(laps) > 0
        pairs = zip(unpatched["laps_seconds_per_step"], laps, strict=True)
        assert ratio["median"] == pytest.approx(sum(base / own for base, own in pairs) / 2)
        assert 0 < ratio["min"] <= ratio["q1"] <= ratio["median"] <= ratio["q3"] <= ratio["max"]
        assert subject["peak_memory_bytes"] is None
    assert all(subject["relative_difference_to_unpatched"] > 1e-4 for subject in size["subjects"][1:])


@needs_comfyui
def test_report_names_what_a_figure_needs_beside_it(out, document):
    assert document["complete"] is True and document["format"] == "dha-speed-bench"
    machine, settings = document["machine"], document["settings"]
    assert machine["device"] == "cpu" and machine["processor"] and machine["torch"] == torch.__version__
    assert machine["comfyui"][0].isdigit() and machine["commit"]
    assert machine["command"].startswith("python -m workflows.bench --mini")
    assert settings["dtype"] == "fp32" and settings["batch"] == 1 and "mini" in settings["weights"]
    table = (out / "speed-mini-cpu-fp32.md").read_text()
    assert all(subject["title"] in table for subject in document["sizes"][0]["subjects"])
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]


def test_pair_counter_counts_batch_queries_and_keys_but_not_heads():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with PairCounter() as counter:
        counted = F.scaled_dot_product_attention(q, k, k)
    assert counter.pairs == 2 * 5 * 7
    assert torch.equal(counted, F.scaled_dot_product_attention(q, k, k))


def test_time_is_shared_by_work(monkeypatch):
    monkeypatch.setattr("workflows.bench.timing.time.monotonic", lambda: 100.0)
    sizes = [Size(512, 512), Size(1024, 1024)]
    assert share_time(sizes, 0, 200) == pytest.approx(100 + 100 * 1.18 / (1.18 + 4 + 0.18 * 16))
    assert share_time(sizes, 1, 200) == 200
    assert share_time(sizes, 1, 50) == 100


def make_run() -> Run:
    records = [
        Record("unpatched", "as it is", 100, 0.0, 9.0, [4.0, 6.0, 10.0], 3_000_000_000, 5),
        Record("dha-0.125", "ours", 20, 0.1, 3.0, [2.0, 2.0, 4.0], 2_000_000_000, 4),
    ]
    machine = {"device": "Some GPU", "comfyui": "0", "torch": "0", "commit": "0", "command": "c"}
    settings = {"weights": "w", "dtype": "fp16", "batch": 1, "note": "n"}
    return Run(machine, settings, [SizeResult(Size(512, 512), 1, records)])


def test_ratio_is_the_median_of_ratios_within_a_round():
    ours = summarise(make_run())["sizes"][0]["subjects"][1]
    assert ours["ratio_to_unpatched"] == {"median": 2.5, "min": 2.0, "max": 3.0, "q1": 2.25, "q3": 2.75}
    assert ours["attention_pairs_share"] == 0.2


def test_unfinished_run_says_so_and_memory_has_its_column():
    table = write_markdown(summarise(make_run()))
    assert "not finished" in table and "peak GB" in table and "| 2.00 |" in table


def test_failed_write_leaves_the_earlier_report(tmp_path, monkeypatch):
    write_report(tmp_path, "speed", make_run())
    before = (tmp_path / "speed.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("workflows.bench.report.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, "speed", Run({**make_run().machine, "commit": "1"}, make_run().settings, []))
    assert (tmp_path / "speed.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.png"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--sizes", "500"), ("--sizes", "512x"), ("--sizes", "8x8"), ("--budgets", "0"), ("--rounds", "0")],
)
def test_wrong_options_are_refused_with_what_was_expected(option, value, monkeypatch, capsys):
    from workflows.bench.__main__ import parse_arguments

    monkeypatch.setattr(sys, "argv", ["bench", option, value])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "expected" in capsys.readouterr().err
