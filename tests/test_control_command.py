"""`python -m dkd_trainer control`: published checkpoints are converted, and a wrong command is told what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from control_files import steer

from dha.control import PREFIX, FCNet
from dha.control_file import ControlConfig, load_control, read_published

ROOT = Path(__file__).resolve().parent.parent


def write_published(teacher, path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of the published form with a branch for the mini teacher."""
    from dkd_trainer.control.branch import TrainedBranch

    weights = TrainedBranch(teacher, ControlConfig("high", 0)).named_weights()
    state = {PREFIX + name: 1.1 * tensor.detach() + 0.01 for name, tensor in weights.items()}
    unet = {f"model.diffusion_model.{name}": tensor for name, tensor in teacher.unet.state_dict().items()}
    torch.save({"state_dict": {**state, **unet}, "global_step": 1}, path)
    return state


def test_a_published_checkpoint_is_converted_and_drawn_with(studio, teacher, tmp_path):
    from dkd_trainer.control.command import main

    state = write_published(teacher, tmp_path / "published.ckpt")
    path = studio.base / "models" / "dha_control" / "published.safetensors"
    main(["convert", str(tmp_path / "published.ckpt"), "--band", "high", "--out", str(path)])
    assert read_published(tmp_path / "published.ckpt", "high").teacher == teacher.fingerprint
    control = load_control(path)
    assert control.config == ControlConfig("high", 0) and control.teacher == teacher.fingerprint
    assert all(torch.equal(tensor, state[PREFIX + name].half()) for name, tensor in control.weights.items())
    loaded = studio.call("DHALoadFrequencyControl", control_name=path.name)
    (branch,) = steer(studio, loaded, torch.zeros(1, 4, 16, 16)).get_additional_models()
    assert isinstance(branch.model, torch.nn.Module) and type(branch.model).__name__ == FCNet.__name__
    found = branch.model.state_dict()
    assert all(torch.equal(found[name].half(), tensor.cpu()) for name, tensor in control.weights.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "d"], "--out is missing"),
        (["--out", "c.safetensors"], "--data is missing"),
        (["--data", "d", "--out", "c.ckpt"], "expected a name ending in .safetensors"),
        (["--data", "d", "--out", "c.safetensors", "--band", "medium"], "'control.band' is 'medium'"),
        (["--data", "d", "--out", "c.safetensors", "--set", "control.ranks=3"], "the nearest that exists is"),
        (["convert", "absent.ckpt", "--band", "low", "--out", "c.safetensors"], "absent.ckpt does not exist"),
    ],
)
def test_a_wrong_command_is_refused_by_what_is_wrong(arguments, words):
    from dkd_trainer.control.command import main

    with pytest.raises(ValueError, match=words):
        main(arguments)


def test_the_trainers_command_passes_on_to_it_and_an_error_is_one_line(tmp_path):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "dkd_trainer", "control", "convert", "a.ckpt", "--band", "low", "--out", "c.ckpt"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("dkd_trainer: the control file is to be 'c.ckpt'")
