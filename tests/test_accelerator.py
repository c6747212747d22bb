"""What runs on a GPU keeps its tensors there and waits for none of them; see `pretended_gpu` for how that is asked."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import TRAINED, make_student
from pretended_gpu import GPU, autocast, move, pretend_gpu

from dha.config import DHAConfig
from dha.control_file import ControlConfig
from dha.frequency import dct_matrix, filter_band
from dha.patch import WATCH, make_patches, plain_attention
from dha.presets import PRESETS
from dha.student import FREE_CONFIG, Student
from dkd_trainer.engine.stages import Stage
from dkd_trainer.settings import ImitationSettings, TransferSettings

FREE, OFFICIAL = FREE_CONFIG, DHAConfig(mode="official", token_budget=0.5, levels=(0,))
STAGES = {
    "transfer": TransferSettings(spread=0.1),
    "one grid": TransferSettings(spread=1.0),
    "imitation": ImitationSettings(spread=0.1),
    "guided": ImitationSettings(guidance=(2.0, 6.0), noise=(0.5, 0.5), blocks=1.0, attention=1.0),
}
TRAININGS = [("student", name, TRAINED, stage) for name, stage in STAGES.items()] + [
    ("official", name, OFFICIAL, stage)
    for name, stage in {**STAGES, "published": ImitationSettings(attention=1.0, maps=1.0, routing=1.0)}.items()
]


@pytest.fixture
def pretended():
    from dkd_trainer.diffusion import alphas_cumprod

    with pretend_gpu():
        yield
    for kept in (alphas_cumprod, dct_matrix):  # for each device, of which one was not there
        kept.cache_clear()


def run_unet(studio, config: DHAConfig, moved: bool = True, watch=None, **settings) -> torch.Tensor:
    """A forward in fp16 with sides that no stride divides."""
    unet, student = move(studio.model.model.diffusion_model, torch.float16), build(studio.architecture, config)
    student = move(student, torch.float16) if moved else student
    half = {"device": GPU, "dtype": torch.float16}
    x, text, t = torch.randn(2, 4, 17, 23, **half), torch.randn(2, 77, 128, **half), torch.randn(2, device=GPU)
    options = {**make_patches(student, plain_attention, **settings).as_options(), "sigmas": t / 100}
    if watch is not None:
        options[WATCH] = watch
    with torch.no_grad():
        return unet(x, t, context=text, transformer_options=options)


def build(architecture, config: DHAConfig) -> Student:
    if config.mode == "official":
        return Student(config, architecture, head_width=32)
    return make_student(architecture, config=config)


@pytest.mark.parametrize("config", [FREE, TRAINED, OFFICIAL], ids=["training-free", "student", "official"])
def test_a_forward_stays_on_the_gpu_in_half_precision(studio, pretended, config):
    out = run_unet(studio, config)
    assert (out.device, out.dtype, out.shape) == (GPU, torch.float16, (2, 4, 17, 23))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_does_so_in_each_of_its_stretches(studio, pretended, preset):
    stretches = PRESETS[preset].stretches
    for number in range(len(stretches)):
        planned = {"stretches": stretches, "find_stretch": lambda _options, number=number: number}
        assert run_unet(studio, TRAINED, **planned).device == GPU


def test_what_a_watcher_is_shown_is_on_the_gpu_too(studio, pretended):
    seen = []
    run_unet(studio, TRAINED, watch=lambda _site, _plan, grid, chosen, _options: seen.extend((grid, chosen)))
    assert seen and all(tensor.device == GPU for tensor in seen)


def test_weights_that_were_left_behind_are_noticed(studio, pretended):
    """The check can fail."""
    with pytest.raises(RuntimeError, match="device"):
        run_unet(studio, TRAINED, moved=False)


def test_a_value_that_is_fetched_is_noticed(studio, pretended):
    """The check can fail."""
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        run_unet(studio, FREE, find_stretch=lambda options: options["sigmas"][0].item())


@pytest.mark.parametrize("band", ["mini", "low"])
def test_a_control_branch_stays_there_with_its_hint_and_the_student_in_it(teacher, pretended, band):
    from dkd_trainer.control.branch import build_branch

    student = move(build(teacher.architecture, TRAINED), torch.float16)
    branch = move(build_branch(teacher, ControlConfig(band=band)), torch.float16)
    source, x = (torch.randn(2, 4, 17, 23, device=GPU, dtype=torch.float16) for _ in range(2))
    t, text = torch.randn(2, device=GPU), torch.randn(2, 77, 128, device=GPU, dtype=torch.float16)
    options = {**make_patches(student, plain_attention).as_options(), "sigmas": t / 100}
    with torch.no_grad():
        pairs = branch(x, branch.embed_hint(filter_band(source, band)), t, text, options)
    assert len(pairs) == 13 and {(part.device, part.dtype) for pair in pairs for part in pair} == {(GPU, torch.float16)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: f"{training[0]}, {training[1]}")
def test_the_losses_of_a_training_are_computed_on_the_gpu(teacher, pretended, training, precision):
    *_, config, settings = training
    student, moved = move(build(teacher.architecture, config), torch.float32), copy.copy(teacher)
    moved.unet, moved.device = move(teacher.unet, torch.float32), GPU
    with autocast() if precision == "bf16" else nullcontext():
        terms = Stage("a stage", 0, settings).measure(moved, student, make_batch(), checkpointing=False)
    assert terms and {(value.device, value.dtype) for value in terms.values()} == {(GPU, torch.float32)}


def make_batch(count: int = 2):
    from dkd_trainer.data.batches import Batch

    latents, noise, noisy = (torch.randn(count, 4, 16, 16, device=GPU) for _ in range(3))
    t, scales = torch.zeros(count, dtype=torch.long, device=GPU), torch.ones(count, device=GPU)
    context, empty = torch.randn(count, 77, 128, device=GPU), torch.randn(1, 77, 128, device=GPU)
    return Batch(latents, noise, noisy, t, context, empty, scales, budget=0.125, seed=7)
