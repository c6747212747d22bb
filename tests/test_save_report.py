"""Save DHA Report: a new file each time, and only of what is a report."""

import json
import os

import pytest


@pytest.fixture
def save(studio, monkeypatch, tmp_path):
    """Runs the node with an output folder of its own; the paths below it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def run(prefix: str, report: str = '{"psnr": 30.0}') -> list[str]:
        studio.host.call("DHASaveReport", report=report, filename_prefix=prefix)
        return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))

    return run


@pytest.mark.parametrize("prefix", ["owl", "deep/er/owl", "reports/", "./owl/.", " owl "])
def test_a_second_report_replaces_nothing(save, tmp_path, prefix):
    (first,) = save(prefix)
    assert save(prefix, '{"psnr": 20.0}') == [first, first.replace("00001", "00002")]
    assert json.loads((tmp_path / first).read_text()) == {"psnr": 30.0}


def test_a_number_that_is_taken_is_passed_over(save, monkeypatch):
    """As where another server saved after ComfyUI had counted."""
    save("owl")
    monkeypatch.setattr(os, "listdir", lambda _: [])
    assert save("owl") == ["owl_00001_.json", "owl_00002_.json"]


@pytest.mark.parametrize("prefix", ["", " ", ".", "/", "reports/.."])
def test_a_prefix_without_a_name_is_refused(save, tmp_path, prefix):
    with pytest.raises(ValueError, match="Save DHA Report found .* as filename_prefix and expected"):
        save(prefix)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("report", ["", "{}", "[]", "owl"])
def test_what_holds_no_figures_is_refused(save, tmp_path, report):
    with pytest.raises(ValueError, match="Save DHA Report found .* as report .*DKD Train or DKD Training Record"):
        save("owl", report)
    assert not [*tmp_path.iterdir()]
