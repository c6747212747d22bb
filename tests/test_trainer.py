"""The training loop on the real mini teacher: it learns, goes on where it was stopped, and the host loads its file."""

import dataclasses

import pytest
import torch

from dha.checkpoint import load_student
from dha.config import DHAConfig

CONFIG = DHAConfig(levels=(0,), memory=4, rank=4, router_width=16)


@pytest.fixture(scope="module")
def teacher(studio):
    from dkd_trainer.host import Teacher

    return Teacher(studio.checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def pairs(teacher):
    generator = torch.Generator().manual_seed(0)
    prompts = ["red apple, noto style, pink background", "octopus, flat style, white background"]
    contexts = torch.cat([teacher.encode_prompt(p) for p in prompts] * 4)
    latents = torch.nn.functional.interpolate(torch.randn(8, 4, 4, 4, generator=generator), scale_factor=4)
    return {"latents": latents, "context": contexts, "empty": teacher.encode_prompt("")}


def make_run(**changes):
    from dkd_trainer.loop import Run

    return dataclasses.replace(Run(CONFIG, transfer_steps=3, imitation_steps=3, batch=2, save_every=2), **changes)


def test_resumed_training_equals_uninterrupted_training_to_the_bit(teacher, pairs, tmp_path, monkeypatch):
    from dkd_trainer import loop

    loop.train_student(teacher, pairs, make_run(), tmp_path / "whole.safetensors", tmp_path / "whole.pt")
    draw = loop.draw_losses

    def stop_at_four(teacher, student, pairs, run, step):
        if step == 4:
            raise KeyboardInterrupt
        return draw(teacher, student, pairs, run, step)

    parts = tmp_path / "parts.safetensors", tmp_path / "parts.pt"
    monkeypatch.setattr(loop, "draw_losses", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        loop.train_student(teacher, pairs, make_run(), *parts)
    assert not parts[0].exists()
    monkeypatch.setattr(loop, "draw_losses", draw)
    loop.train_student(teacher, pairs, make_run(), *parts)
    whole, resumed = (load_student(tmp_path / f"{n}.safetensors").named_weights() for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_of_other_settings_is_not_continued(teacher, pairs, tmp_path):
    from dkd_trainer.loop import train_student

    state = tmp_path / "state.pt"
    train_student(teacher, pairs, make_run(transfer_steps=1, imitation_steps=0), tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match="other settings"):
        train_student(teacher, pairs, make_run(transfer_steps=2), tmp_path / "b.safetensors", state)


def test_a_loss_that_is_no_number_stops_the_training_before_it_spoils_the_state(teacher, pairs, tmp_path, monkeypatch):
    from dkd_trainer import loop

    draw = loop.draw_losses

    def spoil(teacher, student, pairs, run, step):
        losses = draw(teacher, student, pairs, run, step)
        return {k: v * (float("nan") if step == 3 else 1) for k, v in losses.items()}

    monkeypatch.setattr(loop, "draw_losses", spoil)
    with pytest.raises(FloatingPointError, match="step 3"):
        loop.train_student(teacher, pairs, make_run(), tmp_path / "s.safetensors", tmp_path / "s.pt")
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.isfinite(t).all() for t in state["student"].values())


def test_attention_transfer_lowers_the_error_of_every_layer(teacher, pairs):
    from dha.student import Student
    from dkd_trainer.diffusion import add_noise
    from dkd_trainer.transfer import transfer_losses

    torch.manual_seed(0)
    student = Student(CONFIG, teacher.architecture).start()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    t = torch.tensor([100, 400, 700, 900])
    noisy = add_noise(pairs["latents"][:4], torch.randn(4, 4, 16, 16), t)
    first = None
    for _ in range(20):
        losses = transfer_losses(teacher, student, noisy, t, pairs["context"][:4])
        first = first or {name: value.item() for name, value in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert len([name for name in first if not name.endswith("/routing")]) == 5
    assert all(losses[name].item() < value for name, value in first.items())


def test_the_trunk_is_left_as_it_was(teacher, pairs, tmp_path):
    from dkd_trainer.loop import train_student

    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    train_student(teacher, pairs, make_run(), tmp_path / "s.safetensors", tmp_path / "s.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.unet.state_dict().items())
