"""The speed bench on the mini architecture: every subject computes what its name says, and the report says so."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("aiohttp", reason="the bench drives ComfyUI, whose aiohttp is not installed")
pytest.importorskip("PIL", reason="the bench draws a chart with Pillow, which is not installed")

from dha.presets import PRESETS
from dha.sites import SITES, Architecture
from dha.student import FREE_CONFIG, Student
from workflows.bench.subjects import TITLES

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")
needs_comfyui = pytest.mark.skipif(
    not (Path(COMFYUI) / "comfy" / "sd.py").is_file() or not COMFYUI,
    reason="COMFYUI_PATH does not point to a ComfyUI",
)
WIDTH, HEIGHT, TEXT = 512, 256, 77
CPU = torch.device("cpu")
MEMORY = 32  # tokens of the student that is timed


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


def count_dha_pairs(preset: str, stretch: int = 0, **trained) -> int:
    """Pairs of a student's plan, from the library rather than from the bench."""
    config = replace(FREE_CONFIG, **trained)
    student = Student(config, Architecture({site.name: 32 for site in SITES}, 128, 128))

    def count(level: int, tokens: int) -> int:
        spending = PRESETS[preset].stretches[stretch]
        plan = student.plan(HEIGHT // 8 >> level, WIDTH // 8 >> level, spending)
        near = plan.coarse + plan.chosen + config.memory
        # What all landmarks see together is as much as all tokens see of the landmarks.
        return near + 2 * plan.landmarks if level in config.levels else tokens

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
        **{f"student-{name}": count_dha_pairs(name, memory=MEMORY, rank=8) for name in PRESETS},
        "kv2": count_pairs(lambda level, tokens: tokens if level else tokens // 4),
        "hypertile": halved,
        "tome": halved,
        "dha-fast": count_dha_pairs("fast"),
        "dha-quality": count_dha_pairs("quality"),
        "dha-quality-late": count_dha_pairs("quality", 1),
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
        assert subject["run_memory_bytes"] > 0
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
    marks = 64
    assert pairs["dha-balanced"] == 256 * (16 + 2 * marks) == pairs["student-balanced"] - 256 * MEMORY
    assert pairs["official-0.5"] == 128 * 128


@needs_comfyui
def test_profile_takes_a_layer_apart(document):
    free, trained, *_ = find_results(document, "profile")
    assert (free["student"], trained["student"]) == ("training-free", "trained")
    names = [{subject["name"] for subject in result["subjects"]} for result in (free, trained)]
    trained = {
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
