"""Any Stable Diffusion 2.x checkpoint teaches: .ckpt as well as .safetensors, eps as well as v prediction."""

import os

import pytest
import torch
from safetensors.torch import load_file

from dha.checkpoint import read_metadata
from dkd_trainer.fields import SettingsError

MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"  # by which ComfyUI tells v from eps


class Trap:
    """What a pickle would run when it is opened without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_eps_teacher_in_a_ckpt_teaches(studio, corpus, make_settings, tmp_path):
    from dkd_trainer.engine.loop import train_student
    from dkd_trainer.host import Teacher

    state = load_file(studio.checkpoint)
    state[MARK] = torch.zeros_like(state[MARK])
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "teacher.ckpt")
    teacher = Teacher(tmp_path / "teacher.ckpt", torch.device("cpu"))
    assert teacher.prediction == "eps"
    settings = make_settings(transfer__steps=2, imitation__steps=2, imitation__noise=[1.0, 1.0])
    train_student(teacher, corpus, settings)
    metadata = read_metadata(settings.out)
    assert metadata["prediction"] == "eps" and metadata["teacher"] == teacher.fingerprint


def test_code_in_a_ckpt_is_not_run(tmp_path):
    from dkd_trainer.host import Teacher

    torch.save({"state_dict": {MARK: torch.zeros(3)}, "more": Trap(tmp_path / "sprung")}, tmp_path / "trap.ckpt")
    with pytest.raises(Exception, match="[Ww]eights"):
        Teacher(tmp_path / "trap.ckpt", torch.device("cpu"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["maps", "routing"])
def test_losses_of_published_students_are_refused_for_others(prepare, make_settings, name):
    with pytest.raises(SettingsError, match=f"'imitation.{name}' belongs to students of mode 'official'"):
        prepare(make_settings(**{f"imitation__{name}": 0.1}))


def test_a_device_that_is_asked_for_holds_for_the_hosts_own_models_too(studio):
    import comfy.cli_args

    from dkd_trainer.host import ensure_comfy

    before = vars(comfy.cli_args.args).copy()
    try:
        comfy.cli_args.args.cpu = False
        ensure_comfy(None, "cpu")
        assert comfy.cli_args.args.cpu and comfy.cli_args.args.fp32_vae
    finally:
        vars(comfy.cli_args.args).update(before)
