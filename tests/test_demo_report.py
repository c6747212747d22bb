"""The demo's report from made-up results, and the demo itself where its models are there."""

import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from workflows.demo import __main__ as demo
from workflows.demo import report as report_module
from workflows.demo.report import write_report
from workflows.demo.results import Comparison, Machine, Results
from workflows.server import PACK

PAGE_FILES = {"contact-sheet.png", "report.html", "results.json", "results.md", "pictures"}


def encode(width: int, height: int, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_report(seed: int, psnr: float | None, speedup: float = 0.5) -> dict:
    return {
        "psnr": psnr,
        "identical": psnr is None,
        "mean_absolute_difference": 0.01 * seed,
        "relative_latent_difference": 0.1 * seed,
        "original": {"seconds": 1.0, "seconds_per_step": 0.5},
        "student": {"seconds": 1.0 / speedup, "seconds_per_step": 0.5 / speedup},
        "speedup": speedup,
        **{"steps": 2, "width": 32, "height": 32, "batch": 1, "cfg": 4.0, "sampler": "euler", "scheduler": "normal"},
        **{"seed": seed, "repeats": 1, "device": "cpu", "dtype": "float32"},
    }


def make_results(**speed) -> Results:
    machine = Machine("a processor", 2, "cpu", "0.3.75", "2.13", "3.11", "abc", "python -m workflows.demo")
    results = Results(machine, "teacher.safetensors", "student.safetensors", **speed)
    for seed, (prompt, psnr) in enumerate((("<b>cat</b> | dog", 30.0), ("fish & chips", None), ("owl", 20.0)), 1):
        pictures = [encode(32, 32, 50), encode(32, 32, 60), encode(96, 32, 70)]
        results.comparisons.append(Comparison(prompt, make_report(seed, psnr), *pictures))
    return results


class Page(HTMLParser):
    """Pictures, links and table cells of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.sources, self.cells, self.tags, self.inside = [], [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag in ("td", "th")
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.inside:
            self.cells.append(data)
            self.inside = False


def test_the_folder_is_complete_and_says_the_same_everywhere(tmp_path):
    results = make_results(speed=make_report(1, None, speedup=1.5) | {"width": 512, "height": 512})
    write_report(tmp_path / "out", results)
    assert {path.name for path in (tmp_path / "out").iterdir()} == PAGE_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 9
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["quality"]["mean_psnr"] == 25 and saved["speed"]["report"]["speedup"] == 1.5
    assert saved["quality"]["mean_relative_latent_difference"] == pytest.approx(0.2)
    markdown = (tmp_path / "out" / "results.md").read_text()
    for text in ("30.0", "identical", "25.0", "1.50x", "512x512", "random weights", "emoji art", "a processor"):
        assert text in markdown
    assert Image.open(tmp_path / "out" / "contact-sheet.png").size == (192, 28 + 3 * (64 + 28))


def test_markdown_tables_have_as_many_cells_in_every_row(tmp_path):
    write_report(tmp_path / "out", make_results())
    tables = re.findall(r"(?:^\|.*\|\n)+", (tmp_path / "out" / "results.md").read_text(), re.M)
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}) == 1


def test_the_page_needs_nothing_else_and_shows_prompts_as_text(tmp_path):
    write_report(tmp_path / "out", make_results(speed_problem="Left out <here>."))
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert len(page.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"b", "here", "script", "link"} & page.tags
    assert "<b>cat</b> | dog" in page.cells and "identical" in page.cells
    assert "Left out &lt;here&gt;." in text and "x as fast" not in text


def test_an_earlier_report_is_replaced_and_anything_else_is_not(tmp_path):
    out = tmp_path / "out"
    write_report(out, make_results())
    (out / "old.txt").write_text("old")
    write_report(out, make_results())
    assert {path.name for path in out.iterdir()} == PAGE_FILES
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="--out"):
        write_report(mine, make_results())
    assert (mine / "thesis.txt").read_text() == "precious"


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_report(out, make_results())
    before = (out / "results.json").read_bytes()

    def fail(results):
        raise OSError("disk full")

    monkeypatch.setattr(report_module, "write_html", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(out, make_results())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "results.json").read_bytes() == before
    assert {path.name for path in out.iterdir()} == PAGE_FILES


def test_a_missing_model_is_named_with_its_cure(tmp_path, monkeypatch):
    missing = PACK / "workflows" / "models" / "dha" / "nowhere.safetensors"
    monkeypatch.setattr(demo, "MODELS", {missing: "the student"})
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors \(the student\) is missing.*git checkout"):
        demo.check_models()


def test_the_demo_from_end_to_end(tmp_path):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if absent := [path.name for path in demo.MODELS if not path.is_file()]:
        pytest.skip(f"{absent[0]} is not there")
    command = [sys.executable, "-m", "workflows.demo", "--prompts", "1", "--steps", "2", "--no-fullsize"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], cwd=PACK, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "results.json").read_text())["quality"]["prompts"][0]
    assert report["steps"] == 2 and report["original"]["seconds"] > 0
    original, student = (
        np.asarray(Image.open(tmp_path / "out" / "pictures" / f"01-{side}.png")) for side in ("original", "student")
    )
    assert original.shape == (128, 128, 3) and not np.array_equal(original, student)
