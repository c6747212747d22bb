"""What the evaluation says: summaries, the null band, peers at equal time, the page and its charts."""

import re

import pytest
import torch

from dkd_trainer.evidence import charts
from dkd_trainer.evidence.report import (
    Report,
    choose_shown,
    compare_at_equal_time,
    list_tables,
    shorten,
    to_document,
    write_report,
)
from dkd_trainer.evidence.summary import judge_null_band, summarise

pytest.importorskip("efficientnet_lite_pytorch", reason="picture features come with the extra `train`")


def test_summary_is_the_ratio_of_sums_and_the_error_of_the_mean():
    measured = {
        "error": torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]]),
        "lasting": torch.tensor([[1.0, -9.0, 0, 0], [0.0, 0, 0, 0]]),  # an estimate of a square may lie below 0
        "energy": torch.full((2, 4), 2.0),
        "prompt_score": torch.tensor([0.2, 0.6]),
    }
    row = summarise(measured, {"prompt_score": torch.tensor([0.1, 0.3])}, {})
    assert row["error 0-100"] == pytest.approx(1.0) and row["error mean"] == pytest.approx(0.25)
    assert row["lasting error"] == pytest.approx(0.5 / 4)
    assert row["prompt_score"] == pytest.approx(0.4) and row["prompt_score_error"] == pytest.approx(0.2)
    assert row["prompt_score_change"] == pytest.approx(0.2) and row["prompt_score_change_error"] == pytest.approx(0.1)


def test_the_null_band_forgives_noise_in_changes_only():
    rows = {
        "null": {"perceptual": 0.1, "kid_change_x1e3": -1.0},
        "near": {"perceptual": 0.1, "kid_change_x1e3": 2.0, "kid_change_x1e3_error": 0.6},
        "far": {"perceptual": 0.11, "kid_change_x1e3": 2.0, "kid_change_x1e3_error": 0.4},
    }
    verdicts = judge_null_band(rows, ["null"], ["near", "far"])
    assert verdicts["near"] == {"perceptual": True, "kid_change_x1e3": True}
    assert verdicts["far"] == {"perceptual": False, "kid_change_x1e3": False}


def make_report():
    rows = {"teacher": {"kid_x1e3": 5.0, "kid_x1e3_error": 1.0}}
    bands = ("error 0-100", "error 100-300", "error 300-600", "error 600-1000")
    for name, error in {"ours": 0.2, "slow peer": 0.3, "slower peer": 0.1, "fast peer": 0.05}.items():
        rows[name] = {**dict.fromkeys(bands, error), "error mean": error}
    families = {"ours": ("DHA", "12 %"), **{f"{kind} peer": ("peer", kind) for kind in ("slow", "slower", "fast")}}
    relative = {"teacher": 1.0, "ours": 0.8, "slow peer": 0.9, "slower peer": 0.95, "fast peer": 0.6}
    times = {n: {"seconds": r, "q1": r, "q3": r, "relative": r, "attention_pairs": r} for n, r in relative.items()}
    timing = [{"checkpoint": "a", "architecture": "b", "batch": 2, "rounds": 3, "size": 64, "subjects": times}]
    settings = dict.fromkeys(("teacher", "architecture", "prediction", "held_out_pairs", "sampler", "precision"), "x")
    settings |= {"size": 64, "steps": 25, "cfg": 4.0, "note": "", "students": {"ours.safetensors": "0123456789abcdef"}}
    record = dict.fromkeys(("command", "commit", "hardware", "torch", "comfyui"), "<x>")
    sheet = [("teacher", torch.zeros(3, 3, 8, 8, dtype=torch.uint8))]
    return Report(record, settings, rows, families, {"ours"}, timing, {"FID": "no package"}, sheet)


def test_peers_are_compared_at_the_same_time_or_more():
    report = make_report()
    times = report.timing[0]["subjects"]
    assert compare_at_equal_time(report, times)["ours"]["best"] == "slower peer"
    assert not compare_at_equal_time(report, times)["ours"]["better_than_best"]
    times["slower peer"]["relative"] = 0.7
    found = compare_at_equal_time(report, times)["ours"]
    assert (found["peers"], found["best"], found["better_than_best"]) == (1, "slow peer", True)


def test_what_stops_early_is_compared_by_its_pictures_alone():
    """By error it would win whole bands of timesteps for less than that many steps."""
    report = make_report()
    report.rows["ours"] |= {"error 0-100": 0.0, "error mean": 0.05}
    times = report.timing[0]["subjects"]
    assert compare_at_equal_time(report, times) == {}
    for name, distance in {"ours": 0.02, "slow peer": 0.03, "slower peer": 0.01, "fast peer": 0.5}.items():
        report.rows[name]["perceptual"] = distance
    found = compare_at_equal_time(report, times)["ours"]
    assert (found["best"], found["better_than_best"]) == ("slower peer", False)
    (_, head, cells), *_ = [table for table in list_tables(report, to_document(report)) if "UNet step" in table[0]]
    assert head[-1].endswith("by perceptual distance")
    assert dict(zip(head, cells[2], strict=True))["perceptual"] == "0.030"


def test_peers_that_are_no_faster_than_the_teacher_are_told_apart():
    report = make_report()
    times = report.timing[0]["subjects"]
    times["slower peer"]["relative"] = 1.1
    found = compare_at_equal_time(report, times)["ours"]
    assert (found["best"], found["better_than_best"]) == ("slower peer", False)
    assert (found["best_faster"], found["better_than_best_faster"]) == ("slow peer", True)


def test_the_page_holds_its_pictures_and_says_what_is_missing(tmp_path):
    files = write_report(make_report(), tmp_path, "evaluation")
    assert {file.suffix for file in files} == {".json", ".md", ".html", ".png"} and all(f.is_file() for f in files)
    page = (tmp_path / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "&lt;x&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "FID: no package" in page and "FID (no package)" in (tmp_path / "evaluation.md").read_text()


def test_the_difference_shown_is_of_the_student_at_its_own_budget():
    report = make_report()
    names = ["teacher", "a peer", "free", "ours, 12.5 %", "ours, 50 %"]
    report.sheet = [(name, torch.full((3, 3, 8, 8), n, dtype=torch.uint8)) for n, name in enumerate(names)]
    report.ours, report.shown = {"free", "ours, 12.5 %", "ours, 50 %"}, ["ours, 12.5 %"]
    *rows, (title, difference) = shorten(report)
    assert [name for name, _ in rows] == ["teacher", "free", "ours, 12.5 %", "ours, 50 %"]
    assert title == "4 x difference, ours, 12.5 %" and difference.unique().tolist() == [4 * 3]
    report.shown = ["ours, 25 %"]
    assert choose_shown(report) == "ours, 50 %", "its own budget was not measured"


def test_with_presets_a_published_student_is_still_the_one_shown():
    report = make_report()
    names = ["teacher", "ours, 12.5 %", "ours, preset fast", "published"]
    report.sheet = [(name, torch.full((3, 3, 8, 8), n, dtype=torch.uint8)) for n, name in enumerate(names)]
    report.ours, report.shown = set(names[1:]), ["published"]
    *rows, (title, difference) = shorten(report)
    assert [name for name, _ in rows] == ["teacher", "ours, preset fast"]
    assert title == "4 x difference, published" and difference.unique().tolist() == [4 * 3]


def test_the_page_says_which_students_file_was_measured(tmp_path):
    write_report(make_report(), tmp_path, "evaluation")
    for name in ("evaluation.md", "evaluation.html"):
        assert "ours.safetensors 0123456789abcdef" in (tmp_path / name).read_text()


def test_points_are_drawn_where_their_values_are():
    scale = charts.fit_scale([0.01, 1.0], 900, 100, True)
    assert scale.place(0.1) == pytest.approx((scale.place(0.01) + scale.place(1.0)) / 2)
    assert scale.list_ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert charts.fit_scale([0.7, 1.3], 0, 100, False).list_ticks() == pytest.approx([0.8, 1.0, 1.2])
    assert charts.fit_scale([2.0], 0, 100, False).place(2.0) == pytest.approx(50)
