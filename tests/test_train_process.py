"""The node's trainer process: found, followed by its journal, given its steps, and ended."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkd_trainer.fields import SettingsError
from dkd_trainer.settings import assemble_settings, share_steps

ROOT = Path(__file__).resolve().parent.parent


def test_a_missing_library_is_named_with_the_command_that_brings_it(module, monkeypatch):
    process = module("train_process")
    monkeypatch.setattr(process, "NEEDED", ("torch", "no_such_library"))
    with pytest.raises(process.TrainerError, match="needs no_such_library; run .* -m pip install no_such_library"):
        process.check_needs()


@pytest.mark.parametrize(("version", "is_needed"), [((3, 10, 14), True), ((3, 11, 0), False)])
def test_a_reader_of_toml_is_needed_where_python_has_none(module, monkeypatch, version, is_needed):
    monkeypatch.setattr(sys, "version_info", version)
    assert ("tomli" in module("train_process").list_needed()) is is_needed


def test_an_isolated_python_starts_the_trainer_too(module, tmp_path):
    """The portable ComfyUI's Python heeds neither PYTHONPATH nor the folder it is started in."""
    command = module("train_process").build_command(["--help"], isolated=True)
    done = subprocess.run([command[0], "-I", *command[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m dkd_trainer" in done.stdout, done.stderr


def test_a_journal_line_that_is_not_whole_is_left_out(module, tmp_path):
    journal = tmp_path / "journal.jsonl"
    assert module("train_journal").read_progress(journal) is None
    start = {
        "event": "start",
        "time": 0,
        "step": 0,
        "steps": 9,
        "stages": [{"name": "transfer", "first": 0, "steps": 9}],
    }
    step = {"event": "step", "time": 0, "step": 2, "stage": "transfer", "losses": {"attention": 0.5}}
    step |= {"images_per_second": 3.0, "seconds_left": 3720}
    journal.write_text("\n".join([json.dumps(start), json.dumps(step), json.dumps({**step, "step": 3})[:-5]]))
    progress = module("train_journal").read_progress(journal)
    assert (progress.step, progress.total) == (2, 9)
    assert progress.describe() == "transfer 2/9, attention 0.5000, 3.0 images/s, 1 h 2 min left"


@pytest.mark.parametrize("total", [1, 2, 7, 1000, 100_000])
@pytest.mark.parametrize("preset", ["mini", "sd21", "official"])
def test_steps_in_all_are_shared_in_the_presets_proportions(preset, total):
    settings = assemble_settings(preset)
    shared = share_steps(settings, total)
    assert shared.steps == total
    for name in ("transfer", "imitation", "quality"):
        expected = total * getattr(settings, name).steps / settings.steps
        assert abs(getattr(shared, name).steps - expected) <= 1
    with pytest.raises(SettingsError, match="--steps"):
        share_steps(settings, -1)


def test_the_end_of_its_input_ends_a_process_on_the_leash():
    code = "from dkd_trainer.engine.leash import follow_parent; follow_parent(); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)
    process.stdin.close()
    assert process.wait(30) == -signal.SIGTERM


def test_a_trainer_that_does_not_end_is_killed_by_a_second_cancel_alone(module, monkeypatch, tmp_path):
    import comfy.model_management

    process, train_module = module("train_process"), module("train")
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(process, "build_command", lambda _: endless)
    asked = []

    def ask(node_id, text):
        asked.append(started.process.poll())
        comfy.model_management.interrupt_current_processing(len(asked) > 2)

    monkeypatch.setattr(train_module, "show_text", ask)
    started = process.TrainerProcess([], tmp_path / "log")
    try:
        train_module.stop(started, "5")
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert asked == [None] * 3 and started.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("kind", "bf16", "expected"),
    [
        ("cuda", True, {"device": "auto"}),
        ("cuda", False, {"device": "auto", "precision": "fp32"}),
        ("mps", False, {"device": "cpu"}),
    ],
)
def test_a_gpu_without_bf16_trains_in_fp32(module, monkeypatch, kind, bf16, expected):
    import comfy.model_management

    train_module = module("train")
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert train_module.choose_hardware() == expected
