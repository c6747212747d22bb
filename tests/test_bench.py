"""The speed bench on the mini architecture: every subject computes what its name says, and the report says so."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("aiohttp", reason="the bench drives ComfyUI, whose aiohttp is not installed")
pytest.importorskip("PIL", reason="the bench draws a chart with Pillow, which is not installed")

from dha.config import DHAConfig
from dha.presets import PRESETS
from dha.sites import SITES, Architecture
from dha.student import Student
from workflows.bench.contest import Entrant, Forecast, PairCounter, Record, hold_contest, share_time
from workflows.bench.measured import list_layers, list_speeds, merge, read_errors, read_result
from workflows.bench.report import Result, Run, summarise, write_markdown, write_report
from workflows.bench.schedule import PARTS, plan_tasks
from workflows.bench.step import Size
from workflows.bench.subjects import TITLES, is_wanted

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")
needs_comfyui = pytest.mark.skipif(
    not (Path(COMFYUI) / "comfy" / "sd.py").is_file() or not COMFYUI,
    reason="COMFYUI_PATH does not point to a ComfyUI",
)
WIDTH, HEIGHT, TEXT = 512, 256, 77
CPU = torch.device("cpu")
MEMORY = 16  # tokens of the student that is timed


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder that a run of the bench left, from a command without ComfyUI on its path."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "workflows.bench", "--mini", "--sizes", f"{WIDTH}x{HEIGHT}", "--rounds", "1"]
    command += ["--parts", "step", "layers", "profile", "pictures", "backends", "--layer-sides", "64", "128"]
    command += ["--device", "cpu", "--steps", "1", "--comfyui", COMFYUI, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def document(out) -> dict:
    return json.loads((out / "speed-mini-cpu-fp32.json").read_text())


def find_results(document: dict, kind: str) -> list[dict]:
    found = [result for result in document["results"] if result["kind"] == kind]
    assert found, f"nothing of kind {kind} was measured"
    return found


def count_pairs(keys_of_level) -> int:
    """Query-key pairs of a step, `keys_of_level(level, tokens)` keys for each query, text included."""
    pairs = 0
    for site in SITES:
        tokens = (HEIGHT // 8 >> site.level) * (WIDTH // 8 >> site.level)
        pairs += tokens * (keys_of_level(site.level, tokens) + TEXT)
    return pairs


def count_dha_pairs(preset: str, **trained) -> int:
    """Pairs of a student's plan, from the library rather than from the bench."""
    config = DHAConfig(levels=(0, 1), **trained)
    student = Student(config, Architecture({site.name: 32 for site in SITES}, 128, 128))

    def count(level: int, tokens: int) -> int:
        spending = PRESETS[preset]
        plan = student.plan(HEIGHT // 8 >> level, WIDTH // 8 >> level, spending.token_budget, spending.max_tokens)
        return plan.coarse + plan.chosen + config.memory if level in config.levels else tokens

    return count_pairs(count)


def count_official_pairs(sparsity: float) -> int:
    """Pairs of published DHA: the chosen tokens among themselves, everywhere the text."""
    pairs = count_pairs(lambda level, tokens: 0)
    for site in SITES:
        tokens = (HEIGHT // 8 >> site.level) * (WIDTH // 8 >> site.level)
        pairs += min(max(16, int(tokens * sparsity)), tokens) ** 2
    return pairs


@needs_comfyui
def test_every_subject_computes_the_attention_that_its_name_promises(document):
    (step,) = find_results(document, "step")
    found = {subject["name"]: subject["attention_pairs"] for subject in step["subjects"]}
    halved = count_pairs(lambda level, tokens: tokens if level else tokens // 2)
    assert found == {
        "unpatched": count_pairs(lambda level, tokens: tokens),
        "dha-balanced": count_dha_pairs("balanced"),
        "ceiling": count_pairs(lambda level, tokens: 0),
        "student-balanced": count_dha_pairs("balanced", memory=MEMORY, rank=8, router_width=64),
        "kv2": count_pairs(lambda level, tokens: tokens if level else tokens // 4),
        "hypertile": halved,
        "tome": halved,
        "dha-fast": count_dha_pairs("fast"),
        "dha-quality": count_dha_pairs("quality"),
        "kv2-two": count_pairs(lambda level, tokens: tokens if level > 1 else tokens // 4),
        "official-0.5": count_official_pairs(0.5),
        "official-0.1": count_official_pairs(0.1),
    }
    assert found["dha-fast"] < found["dha-balanced"] < found["student-balanced"] < 0.3 * found["unpatched"]


@needs_comfyui
def test_subjects_differ_from_the_unpatched_model_and_have_figures(document):
    (step,) = find_results(document, "step")
    assert (step["width"], step["height"], step["tokens"], step["batch"]) == (WIDTH, HEIGHT, 2048, 1)
    assert [subject["name"] for subject in step["subjects"]] == list(TITLES)
    unpatched = step["subjects"][0]
    assert unpatched["relative_difference"] == 0 and unpatched["ratio"]["median"] == 1
    for subject in step["subjects"]:
        laps = subject["laps_seconds"]
        assert len(laps) == step["rounds"] == 1 and laps[0] > 0
        assert subject["ratio"]["median"] == pytest.approx(unpatched["laps_seconds"][0] / laps[0])
        assert subject["run_memory_bytes"] > 0 and subject["peak_memory_bytes"] is None
    ceiling = next(subject for subject in step["subjects"] if subject["name"] == "ceiling")
    assert ceiling["share_of_ceiling"] == 1
    assert all(subject["relative_difference"] > 1e-4 for subject in step["subjects"][1:])


@needs_comfyui
def test_single_layers_are_timed_with_the_keys_of_their_preset(document):
    layers = find_results(document, "layer")
    assert [(layer["level"], layer["tokens"]) for layer in layers] == [
        (0, 64), (0, 256), (1, 16), (1, 64), (2, 4), (2, 16)
    ]  # fmt: skip
    pairs = {s["name"]: s["attention_pairs"] for s in layers[1]["subjects"] if "error" not in s}
    assert pairs["plain"] == 256 * 256 and pairs["ceiling"] == 0 and pairs["kv2"] == 256 * 64
    assert pairs["dha-balanced"] <= 256 * 32 < pairs["student-balanced"] == 256 * (32 + MEMORY)
    assert pairs["official-0.5"] == 128 * 128


@needs_comfyui
def test_profile_takes_a_layer_apart(document):
    free, trained, *_ = find_results(document, "profile")
    assert (free["student"], trained["student"]) == ("training-free", "trained")
    names = [{subject["name"] for subject in result["subjects"]} for result in (free, trained)]
    trained = {
        "context: scores",
        "context: choice",
        "corrections of q and out",
        "corrections of k and v",
        "local branch",
    }
    assert names[1] - names[0] == trained
    assert {"layer", "context", "context: gathering", "attention"} <= names[0]


@needs_comfyui
def test_whole_pictures_are_sampled_and_decoded(document):
    (picture,) = find_results(document, "picture")
    assert picture["steps"] == 1 and picture["batch"] == 2
    assert all(subject["seconds"]["median"] > 0 for subject in picture["subjects"])
    assert picture["subjects"][1]["relative_difference"] > 0


@needs_comfyui
def test_report_names_what_a_figure_needs_beside_it(out, document):
    assert document["complete"] is True and document["format"] == "dha-speed-bench"
    machine, settings = document["machine"], document["settings"]
    assert machine["device"] == "cpu" and machine["processor"] and machine["torch"] == torch.__version__
    assert machine["comfyui"][0].isdigit() and machine["commit"]
    assert machine["command"].startswith("python -m workflows.bench --mini")
    assert settings["dtype"] == "fp32" and settings["batch"] == [1] and "mini" in settings["weights"]
    table = (out / "speed-mini-cpu-fp32.md").read_text()
    assert all(title in table for title in TITLES.values())
    assert all(f"Attention by {name} was left out" in table for name in settings["missing_backends"])
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]


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


def test_without_the_unpatched_model_the_others_still_have_seconds():
    records = hold_contest([enter("first", fails_at=1), enter("second", 0.3)], CPU, rounds=1)
    first, second = summarise(Run({}, {}, [Result("step", {}, records)]))["results"][0]["subjects"]
    assert "error" in first and second["ratio"] is None and second["seconds"]["median"] > 0


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
    from argparse import Namespace

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
        "profile": [("profile", 4096, 2)] * 2,
    }
    assert labels == expected[part] and all(task.weight > 0 for task in tasks)
    if part in ("backends", "compile"):
        assert all(task.labels["backend"] == ("xformers" if part == "backends" else "sdpa") for task in tasks)


def test_subjects_are_chosen_by_name_or_family():
    chosen = [name for name in TITLES if is_wanted(name, ["dha-fast", "official"])]
    assert chosen == ["unpatched", "dha-fast", "official-0.5", "official-0.1"]


def make_record(name: str, seconds: list[float], **values) -> Record:
    return Record(name, f"title of {name}", seconds=seconds, warm_up_seconds=1.0, **values)


def make_run() -> Run:
    records = [
        make_record("unpatched", [4.0, 6.0, 10.0], pairs=100, difference=0.0, peak_memory=3_000_000_000, run_memory=5),
        make_record("dha-fast", [2.0, 2.0, 4.0], pairs=20, difference=0.1, peak_memory=2_000_000_000, run_memory=4),
        make_record("ceiling", [1.0, 1.5, 2.0], pairs=0, difference=0.1),
    ]
    machine = {"device": "Some GPU", "comfyui": "0", "torch": "0", "commit": "0", "command": "c"}
    settings = {"weights": "w", "dtype": "fp16", "note": "n"}
    labels = {"width": 512, "height": 512, "tokens": 4096, "batch": 1, "backend": "sdpa"}
    return Run(machine, settings, [Result("step", labels, records)])


def test_ratio_is_the_median_of_ratios_within_a_round():
    ours = summarise(make_run())["results"][0]["subjects"][1]
    assert ours["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0, "q1": 2.25, "q3": 2.75}
    assert ours["attention_pairs_share"] == 0.2 and ours["share_of_ceiling"] == 2.5 / 4


def test_unfinished_run_says_so_and_memory_has_its_column():
    table = write_markdown(summarise(make_run()))
    assert "not finished" in table and "peak GB" in table and "| 2.00 |" in table and "62%" in table


def test_a_task_that_could_not_be_set_up_has_its_error_in_the_report():
    run = make_run()
    run.results.append(Result("picture", {"width": 64, "height": 64}, error="RuntimeError: no decoder"))
    document = summarise(run)
    assert document["results"][1]["error"] == "RuntimeError: no decoder"
    assert "RuntimeError: no decoder" in write_markdown(document)


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


def make_layers() -> dict:
    """A run with one layer: the student is slower than training-free at the preset balanced."""
    seconds = {"plain": 4.0, "dha-balanced": 1.0, "student-balanced": 2.0, "dha-0.5": 3.0, "student-0.5": 5.0}
    records = [make_record(name, [value]) for name, value in [*seconds.items(), ("dha-fast", 1.0)]]
    run, labels = make_run(), {"width": 2048, "height": 2048, "level": 0, "channels": 320, "tokens": 65536}
    run.results.append(Result("layer", labels, records))
    return summarise(run)


def test_the_slower_of_student_and_training_free_decides_whether_a_layer_pays():
    assert list_layers(make_layers()) == [[320, 65536, 2048 / 65536, 2.0], [320, 65536, 0.5, 0.8]]


def test_measured_figures_are_renewed_and_others_kept(tmp_path):
    document = make_layers()
    assert list_speeds(document) == {"fast": {"512": 2.5}}
    other = {"device": "cpu", "dtype": "fp32", "machine": "m", "rows": []}
    old = {
        "format": "f",
        "layers": [other],
        "presets": {"quality": {"error": 0.1}, "notes": ["Speed: old.", "Error: e."]},
    }
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"rows": {"training-free fast": {"error mean": 0.25}, "teacher": {}}}))
    merged = merge(old, [document], read_errors(evaluation), "command")
    assert merged["layers"][0] == other and merged["layers"][1]["device"] == "cuda"
    assert merged["presets"]["fast"] == {"speed": {"512": 2.5}, "error": 0.25}
    assert merged["presets"]["quality"] == {"error": 0.1}
    assert [note.split(":")[0] for note in merged["presets"]["notes"]] == ["Speed", "Error"]
    assert "old" not in str(merged["presets"]["notes"])


def test_a_file_of_another_kind_is_no_result_of_the_bench(tmp_path):
    path = tmp_path / "odd.json"
    path.write_text('{"format": "dha-speed-bench", "version": 1}')
    with pytest.raises(ValueError, match="expected"):
        read_result(path)


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
