"""The bench's report and the shipped figures say what was measured, and wrong options are refused."""

import copy
import json
import sys

import pytest

pytest.importorskip("aiohttp", reason="the bench drives ComfyUI, whose aiohttp is not installed")
pytest.importorskip("PIL", reason="the bench draws a chart with Pillow, which is not installed")

from workflows.bench.contest import Record
from workflows.bench.measured import list_layers, list_speeds, merge, read_pictures, read_result
from workflows.bench.report import Result, Run, summarise, write_markdown, write_report


def make_record(name: str, seconds: list[float], **values) -> Record:
    return Record(name, f"title of {name}", seconds=seconds, warm_up_seconds=1.0, **values)


def make_run() -> Run:
    records = [
        make_record("unpatched", [4.0, 6.0, 10.0], pairs=100, difference=0.0, run_memory=3_000_000_000),
        make_record("dha-fast", [2.0, 2.0, 4.0], pairs=20, difference=0.1, run_memory=2_000_000_000),
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
    assert "not finished" in table and "MB a run" in table and "| 2000 |" in table and "62%" in table


def test_an_older_result_that_says_all_memory_on_the_device_is_still_read():
    document = summarise(make_run())
    before = write_markdown(document)
    for subject in document["results"][0]["subjects"]:
        subject["peak_memory_bytes"] = 123_000_000_000
    assert write_markdown(document) == before


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
    assert list_layers(make_layers()) == [[320, 65536, 288 / 65536, 2.0], [320, 65536, 0.5, 0.8]]


def make_steps(**seconds: float) -> dict:
    """A run of UNet steps at 512 pixels on one thread; the unpatched one takes 4 seconds."""
    run = make_run()
    run.machine.update(device="cpu", processor="chip", threads=1)
    records = [
        make_record("unpatched", [4.0]),
        *(make_record(name.replace("_", "-"), [s]) for name, s in seconds.items()),
    ]
    return summarise(Run(run.machine, run.settings, [Result("step", run.results[0].labels, records)]))


def test_measured_figures_are_renewed_and_others_kept(tmp_path):
    document = make_layers()
    document["results"][0]["subjects"].append({"name": "dha-balanced", "ratio": {"median": 4.0}})
    other = {"device": "cpu", "dtype": "fp32", "machine": "m", "rows": []}
    old = {
        "format": "f",
        "layers": [other],
        "presets": {
            "quality": {"speed": {"512": 9.0}, "psnr": 30.0},
            "fast": {"speed": {"768": 9.0}},
            "notes": ["Speed: old.", "Error: e."],
        },
    }
    evaluation = tmp_path / "evaluation.json"
    found = {
        "DHA, training-free, preset fast": 30.0,
        "mini-dha, preset fast": 40.0,
        "mini-dha, 6.25 % of the keys": 41.0,
    }
    rows = {name: {"psnr": psnr} for name, psnr in found.items()}
    evaluation.write_text(json.dumps({"rows": {**rows, "teacher": {}}}))
    merged = merge(old, [document], read_pictures(evaluation), "command")
    assert merged["layers"][0] == other and merged["layers"][1]["device"] == "cuda"
    pictures = {"psnr": 40.0, "psnr_training_free": 30.0}
    assert merged["presets"]["fast"] == {"speed": {"512": [2.5, 4.0]}, "training_free": True, **pictures}
    assert merged["presets"]["quality"] == {"psnr": 30.0}, "its speed was of another run than the note names"
    assert [note.split(":")[0] for note in merged["presets"]["notes"]] == ["Speed", "Pictures"]
    assert "old" not in str(merged["presets"]["notes"])
    again = merge(merged, [document], read_pictures(evaluation), "command")
    assert json.dumps(again) == json.dumps(merged)


def test_a_presets_speed_is_the_students_as_its_error_is():
    document = make_steps(dha_balanced=2.0, student_balanced=2.5, dha_fast=1.0, student_fast=1.25)
    assert list_speeds(document) == {"fast": {"speed": {"512": [3.2, 1.6]}}}
    document = make_steps(student_quality=2.5, student_balanced=2.0, student_fast=1.25)
    expected = {"balanced": {"speed": {"512": [2.0, 1.6]}}, "fast": {"speed": {"512": [3.2, 2.0]}}}
    assert list_speeds(document) == expected, "later steps of balanced are those of quality"
    notes = merge({"format": "f", "layers": [], "presets": {}}, [document], {}, "c")["presets"]["notes"]
    assert notes == ["Speed: of a sampling, from a UNet step of SD-2.1 with a student, chip, 1 thread, fp16, commit 0."]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({"dha_balanced": 2.0, "dha_fast": 1.0}, "SD-2.1 training-free, chip"),
        (
            {"student_balanced": 2.0, "student_quality": 2.5, "dha_balanced": 2.0, "dha_fast": 1.0},
            "SD-2.1 with a student (fast: training-free), chip",
        ),
    ],
)
def test_speed_without_a_student_is_named_so(seconds, said):
    document = make_steps(**seconds)
    assert list_speeds(document)["fast"] == {"speed": {"512": [4.0, 2.0]}, "training_free": True}
    (note,) = merge({"format": "f", "layers": [], "presets": {}}, [document], {}, "c")["presets"]["notes"]
    assert said in note


def test_a_size_that_was_measured_again_takes_the_place_of_the_other_in_its_run():
    first, again = make_steps(dha_fast=1.0, dha_balanced=2.0), make_steps(dha_fast=2.0, dha_balanced=4.0)
    large = copy.deepcopy(first["results"][0])
    first["results"].append({**large, "width": 1024, "height": 1024})

    def list_merged(*documents):
        return merge({"format": "f", "layers": [], "presets": {}}, list(documents), {}, "c")["presets"]["fast"]["speed"]

    assert list_merged(first) == {"512": [4.0, 2.0], "1024": [4.0, 2.0]}
    assert list_merged(first, again) == {"512": [2.0, 1.0], "1024": [4.0, 2.0]}
    other = {**again, "machine": {**again["machine"], "commit": "1"}}
    assert list_merged(first, other) == {"512": [2.0, 1.0]}, "of another commit: figures of one note are of one code"


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
