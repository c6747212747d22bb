"""Stages 2 and 3, imitation: the student runs alone and is pulled to what the teacher does and to real pictures."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dha.dither import draw_phases
from dha.patch import make_patches, read_phase
from dha.presets import OWN, Stretch
from dha.student import Student

from ..data.batches import Batch
from ..diffusion import training_target
from ..host import Teacher
from .attention import trained_attention
from .features import Features, keep_blocks, recompute_layers
from .official import compare_maps, teach_routers
from .transfer import count_grids, joint_error, relative_error


def student_options(student: Student, stretch: Stretch = OWN, phase: Tensor | None = None) -> dict:
    """`transformer_options` that run a student inside the teacher's UNet, as in a `stretch` of a sampling.

    Its grids move with the noise level, or stand at a `phase` (1,).
    """
    phase_of = read_phase if phase is None else lambda _options: phase
    return make_patches(student, trained_attention, [stretch], phase_of=phase_of).as_options()


def list_runs(student: Student, batch: Batch, spread: float) -> list[dict]:
    """A step's `student_options`, one for each of the grids that a loss with a `spread` compares."""
    count = 1 if student.config.mode == "official" else count_grids(spread)
    phases = draw_phases(batch.seed, count, batch.t.device)
    return [student_options(student, Stretch(batch.budget), phase) for phase in phases.split(1)]


def imitation_losses(
    teacher: Teacher,
    student: Student,
    batch: Batch,
    terms: Collection[str] = ("output",),
    guided: bool = False,
    checkpointing: bool = False,
    steer: Callable[[tuple[Tensor, ...], list[dict]], tuple[dict, list[dict], dict[str, Tensor]]] | None = None,
    spread: float = 1.0,
) -> dict[str, Tensor]:
    """The loss terms named in `terms`, as in `settings.ImitationSettings`, with gradients to the student alone.

    With `guided` both models run with and without the prompt, and what guidance mixes is compared (arXiv 2210.03142).
    `steer(inputs, options of the student's runs)` gives the teacher's options, the runs', and losses of its own.
    With a `spread` below 1 the student runs on two grids for the term `output`, see `joint_error`; all other terms are
    of the first run.
    """
    inputs = double_batch(batch) if guided else (batch.noisy, batch.t, batch.context)
    shown, imitated = Features(), Features()
    wants_attention = bool({"attention", "maps", "routing"} & set(terms))
    blocks = (shown, imitated) if "blocks" in terms else (None, None)
    led: dict = {}
    losses: dict[str, Tensor] = {}
    runs = list_runs(student, batch, spread)
    if steer is not None:
        led, runs, losses = steer(inputs, runs)
    with torch.no_grad(), keep_blocks(teacher.unet, blocks[0]):
        target = teacher.predict(*inputs, shown.add_to(led) if wants_attention else led)
    with recompute_layers(teacher.unet, checkpointing):
        with keep_blocks(teacher.unet, blocks[1]):
            prediction = teacher.predict(*inputs, imitated.add_to(runs[0]) if wants_attention else runs[0])
        with torch.no_grad():  # `joint_error` needs the gradients of one alone
            predictions = [prediction, *(teacher.predict(*inputs, options) for options in runs[1:])]
    if "output" in terms:
        scales = batch.guidance if guided else None
        mixed = [mix_guidance(each, scales) for each in predictions]
        losses["output"] = joint_error(mixed, mix_guidance(target, scales), spread)
    if "noise" in terms:
        truth = training_target(batch.latents, batch.noise, batch.t, teacher.prediction)
        losses["noise"] = relative_error(prediction[: len(batch)], truth)
    if "blocks" in terms:
        losses["blocks"] = mean_error(imitated.blocks, shown.blocks)
    if "attention" in terms:
        sites = [site.block for site in student.list_sites()]
        losses["attention"] = mean_error(*({b: f.outputs[b] for b in sites} for f in (imitated, shown)))
    if "maps" in terms:
        losses["maps"] = compare_maps(teacher, student, imitated, shown, batch.seed)
    if "routing" in terms:
        losses["routing"] = teach_routers(teacher, student, shown, batch.seed)
    return losses


def double_batch(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The batch with its prompts, then once more with the empty one."""
    context = torch.cat([batch.context, batch.empty.expand_as(batch.context)])
    return torch.cat([batch.noisy] * 2), torch.cat([batch.t] * 2), context


def mix_guidance(prediction: Tensor, scales: Tensor | None) -> Tensor:
    """e_0 + s (e_c - e_0) of a doubled prediction (2B, 4, h, w) at scales s (B,); as it is without scales."""
    if scales is None:
        return prediction
    prompted, empty = prediction.chunk(2)
    return empty + scales.view(-1, 1, 1, 1) * (prompted - empty)


def mean_error(found: dict, expected: dict) -> Tensor:
    """Mean over layers of the relative error: every layer counts the same, whatever its norm."""
    return torch.stack([relative_error(found[place], expected[place]) for place in expected]).mean()
