"""Any Stable Diffusion 2.x checkpoint teaches: .ckpt as well as .safetensors, eps as well as v prediction."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dha.checkpoint import read_metadata
from dkd_trainer.fields import SettingsError

MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"  # by which ComfyUI tells v from eps

ENTRY = "model.diffusion_model.input_blocks.0.0.weight"


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


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({ENTRY: torch.zeros(32, 9, 3, 3)}, "an inpainting or depth model .9 input channels, expected 4."),
        ({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(128, 2048)}, "an unCLIP model"),
    ],
    ids=["inpainting", "unclip"],
)
def test_a_teacher_that_takes_more_than_noise_and_a_prompt_is_refused(studio, more, words):
    from dha.sites import check_text_to_image

    state = load_file(studio.checkpoint) | more
    unet = {name.removeprefix("model.diffusion_model."): t for name, t in state.items() if "diffusion_model" in name}
    with pytest.raises(ValueError, match=f"other.ckpt is {words}.*plain Stable Diffusion 2.x"):
        check_text_to_image("other.ckpt", unet)


def test_an_inpainting_checkpoint_is_refused_when_it_is_loaded(studio, tmp_path):
    from dkd_trainer.host import Teacher

    state = load_file(studio.checkpoint)
    state[ENTRY] = torch.cat([state[ENTRY], torch.zeros(len(state[ENTRY]), 5, 3, 3)], 1)
    save_file(state, tmp_path / "inpainting.safetensors")
    with pytest.raises(ValueError, match="inpainting.safetensors is an inpainting or depth model"):
        Teacher(tmp_path / "inpainting.safetensors", torch.device("cpu"))


def test_a_unet_that_the_host_has_put_on_a_gpu_stays_where_the_trainer_puts_it(studio, monkeypatch):
    """With more free memory there than in the computer the host does so, and would take it off again."""
    import comfy.model_management
    import comfy.sd

    from dkd_trainer.host import Teacher

    load = comfy.sd.load_checkpoint_guess_config

    def load_onto_device(path):
        found = load(path)
        comfy.model_management.load_models_gpu([found[0]], force_full_load=True)
        return found

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", load_onto_device)
    teacher = Teacher(studio.checkpoint, torch.device("cpu"))
    assert teacher.model.model not in [kept.real_model() for kept in comfy.model_management.current_loaded_models]


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
