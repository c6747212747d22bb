"""A control branch is trained on the real mini teacher, goes on to the bit, and the host draws with its file."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import look_in_parts, relate
from control_files import open_branch, steer
from safetensors.torch import load_file

from dha.control_file import ControlConfig, load_control
from dha.control_weights import merge_weights
from dha.frequency import BANDS, band_mask, filter_band, idct2

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "control.band": "low",
    "control.rank": 4,
    "control.steps": 6,
    "train.batch": 2,
    "train.device": "cpu",
    "data.size": 128,
    "output.save_every": 2,
    "watch.validate_every": 0,
    "watch.sheet_every": 0,
}


@pytest.fixture(scope="module")
def corpus(teacher):
    """Eight pictures of four large patches, so that a low band tells nearly all of them."""
    from conftest import TensorCorpus

    generator = torch.Generator().manual_seed(0)
    context = torch.cat([teacher.encode_prompts([p]) for p in ("red apple", "octopus")] * 4)
    latents = torch.nn.functional.interpolate(torch.randn(8, 4, 2, 2, generator=generator), scale_factor=8)
    return TensorCorpus({"latents": latents, "context": context, "empty": teacher.encode_prompts([""])})


@pytest.fixture
def make_settings(tmp_path):
    from dkd_trainer.control.settings import assemble_control

    def make(name="c", **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        values = {**TINY, **changes, "output.file": str(tmp_path / f"{name}.safetensors")}
        return assemble_control(overrides=values.items())

    return make


@pytest.fixture
def kind():
    from dkd_trainer.control.training import ControlTraining

    return ControlTraining


@pytest.mark.parametrize("rank", [0, 4])
def test_an_untrained_branch_is_the_teacher_bit_for_bit(teacher, corpus, rank):
    from dkd_trainer.control.branch import TrainedBranch

    branch = TrainedBranch(teacher, ControlConfig("low", rank))
    latents, context = corpus.read([0, 1, 2])
    t, options = torch.tensor([10, 500, 990]), branch.as_options(filter_band(latents, "low"))
    with torch.no_grad():
        assert torch.equal(teacher.predict(latents, t, context, options), teacher.predict(latents, t, context))
        branch.weights["zero_convs_add/3/0/bias"] += 0.1
        assert not torch.equal(teacher.predict(latents, t, context, options), teacher.predict(latents, t, context))


def test_a_branch_starts_with_the_teachers_own_encoder(teacher):
    from dkd_trainer.control.branch import TrainedBranch

    base = teacher.unet.state_dict()
    for rank in (0, 4):
        branch = TrainedBranch(teacher, ControlConfig("low", rank))
        state = merge_weights(base, {name: tensor.detach() for name, tensor in branch.named_weights().items()})
        shared = [name for name in state if name in base]
        assert len(shared) > 200 and all(torch.equal(state[name], base[name]) for name in shared)


def test_every_weight_is_trained_once_its_way_out_is_open(teacher, corpus):
    from dkd_trainer.control.branch import TrainedBranch

    branch = TrainedBranch(teacher, ControlConfig("low", 4))
    with torch.no_grad():
        for name, weight in branch.weights.items():
            if name.endswith("/up") or "zero_convs" in name or "_out_" in name or name.startswith("hint_"):
                weight.normal_(std=0.1)
    latents, context = corpus.read([0, 1])
    options = branch.as_options(filter_band(latents, "low"))
    teacher.predict(latents, torch.tensor([400, 800]), context, options).square().sum().backward()
    assert not [name for name, weight in branch.weights.items() if weight.grad is None or not weight.grad.any()]
    assert not any(weight.grad is not None for weight in teacher.unet.parameters())


def test_training_brings_the_loss_below_the_uncontrolled_teachers(teacher, corpus, make_settings, prepare):
    branch = {"control__steps": 20, "control__rate": 3e-3, "control__warmup": 5}
    settings = make_settings(**branch, train__batch=8, train__ema=0.8, watch__validate_every=20)
    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    training = prepare(settings, corpus)
    training.run()
    assert training.errors["steered"] < 0.95 * training.errors["unsteered"]
    assert training.errors["600-1000"] < 0.9
    record = json.loads(settings.out.with_suffix(".json").read_text())
    assert record["validation"] == training.errors and record["bytes"] == settings.out.stat().st_size
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.unet.state_dict().items())


def test_the_error_in_the_own_band_counts_as_often_as_its_weight_says(make_settings, prepare):
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        training = prepare(make_settings(control__own_band=weight, train__clip=0.0))
        training.take_step(0, training.read_step(0))
        assert training.losses.keys() == {"noise", "band"}
        gradients[weight] = torch.cat([weight.grad.flatten() for weight in training.parameters])
    band = gradients[1.0] - gradients[0.0]
    assert band.norm() > 0.1 * gradients[0.0].norm()
    torch.testing.assert_close(gradients[3.0], gradients[0.0] + 3 * band, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("band", BANDS)
def test_the_error_of_a_band_is_blind_to_all_other_coefficients(band):
    from dkd_trainer.control.training import band_error

    kept = band_mask(band, 16, 24)
    coefficients = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    inside, outside = (idct2(coefficients * mask) for mask in (kept, ~kept))
    expected = coefficients[..., kept].square().mean()
    torch.testing.assert_close(band_error(inside, band), expected)
    torch.testing.assert_close(band_error(inside + outside, band), expected)
    assert band_error(outside, band) < 1e-10


def test_checkpointing_changes_no_gradient(teacher, corpus):
    from dkd_trainer.control.branch import TrainedBranch

    branch = TrainedBranch(teacher, ControlConfig("low", 4))
    latents, context = corpus.read([0, 1])
    gradients = []
    for checkpointing in (False, True):
        branch.zero_grad()
        options = branch.as_options(filter_band(latents, "low"), checkpointing)
        teacher.predict(latents, torch.tensor([400, 800]), context, options).square().sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in branch.weights.values()]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_stopped_training_goes_on_to_the_bit(make_settings, prepare, monkeypatch):
    from dkd_trainer.control.training import ControlTraining
    from dkd_trainer.engine.state import TrainingStopped

    whole, parts = make_settings("whole", control__band="mini"), make_settings("parts", control__band="mini")
    prepare(whole).run()
    take_step = ControlTraining.take_step

    def take_and_stop(training, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(training, step, *rest)

    monkeypatch.setattr(ControlTraining, "take_step", take_and_stop)
    with pytest.raises(TrainingStopped):
        prepare(parts).run()
    assert not parts.out.exists()
    monkeypatch.setattr(ControlTraining, "take_step", take_step)
    prepare(parts).run()
    first, second = load_file(whole.out), load_file(parts.out)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_of_another_band_is_not_continued(make_settings, prepare):
    prepare(make_settings(control__steps=2)).run()
    with pytest.raises(ValueError, match="control.band was 'low', is 'high'"):
        prepare(make_settings(control__steps=2, control__band="high")).run()


def test_the_file_holds_the_average_and_says_where_it_comes_from(teacher, make_settings, prepare):
    settings = make_settings()
    average = prepare(settings).run()
    control = load_control(settings.out)
    assert control.config == ControlConfig("low", 4) and control.teacher == teacher.fingerprint
    assert control.architecture == teacher.architecture and control.prediction == teacher.prediction
    assert control.training["pairs"] == 8 and control.training["run"]["control"]["steps"] == 6
    expected = average.named_weights()
    assert control.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].detach().half()) for name, tensor in control.weights.items())
    assert str(settings.out.parent) not in json.dumps(control.training)


def test_a_branch_of_rank_8_fits_into_two_megabytes(teacher, tmp_path):
    from dha.control_file import save_control
    from dkd_trainer.control.branch import TrainedBranch

    path = tmp_path / "c.safetensors"
    save_control(path, TrainedBranch(teacher, ControlConfig("low", 8)).to_file(teacher, {}))
    assert path.stat().st_size <= 2_000_000


def test_a_sheet_shows_source_band_and_both_pictures(make_settings, prepare, corpus):
    settings = make_settings(control__steps=1, watch__sheet_every=1, watch__pictures=2)
    prepare(settings, corpus).run()
    from PIL import Image

    assert Image.open(settings.work / "sheets" / "00000001.png").size == (2 * 128, 4 * 128)


def test_what_is_seen_of_a_branch_does_not_depend_on_the_parts(make_settings, prepare, corpus):
    settings = make_settings(train__batch=3, watch__validate_every=1, watch__pairs=4, watch__pictures=3)
    training = prepare(settings, corpus)
    branch = training.average
    open_branch(branch)
    errors = training.examination.measure_errors(branch)
    assert errors["steered"] > 1.01 * errors["unsteered"], "it steers"
    look_in_parts(training.examination, branch)


def test_the_host_draws_what_the_trainer_trained(studio, teacher, corpus, make_settings, prepare):
    settings = make_settings(control__steps=4, control__rate=0.02, control__warmup=0, train__ema=0.0)
    average = prepare(settings).run()
    path = studio.base / "models" / "dha_control" / "trained.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(settings.out.read_bytes())
    control = studio.call("DHALoadFrequencyControl", control_name=path.name)
    model = steer(studio, control, teacher.model.model.process_latent_out(corpus.read([0])[0]))
    x, context = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), corpus.read([0])[1]
    options = average.as_options(filter_band(corpus.read([0])[0], "low"))
    expected = predict_in_host(studio.model, x, context, options)
    assert relate(predict_in_host(studio.model, x, context, {}), expected) > 1e-3
    ours = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    assert relate(predict_in_host(model, x, context, ours), expected) < 2e-3, "more than fp16 in the file explains"


@torch.inference_mode()
def predict_in_host(model, x, context, options):
    sigma = torch.full((len(x),), 1.0)
    options = {**options, "cond_or_uncond": [0], "sigmas": sigma[:1]}
    return model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options)
