"""Stages 2 and 3, imitation: the student runs alone and is pulled to what the teacher does and to real pictures."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dha.patch import make_patches
from dha.student import Student

from ..data.batches import Batch
from ..diffusion import training_target
from ..host import Teacher
from .attention import trained_attention
from .features import Features, keep_blocks, recompute_layers
from .official import compare_maps, teach_routers
from .transfer import relative_error


def student_options(student: Student, budget: float | None = None, most: int | None = None) -> dict:
    """`transformer_options` that run a student inside the teacher's UNet, at another budget or cap than its own."""
    return make_patches(student, trained_attention, budget, max_tokens=most).as_options()


def imitation_losses(
    teacher: Teacher,
    student: Student,
    batch: Batch,
    terms: Collection[str] = ("output",),
    guided: bool = False,
    checkpointing: bool = False,
    steer: Callable[[tuple[Tensor, ...], dict], tuple[dict, dict, dict[str, Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """The loss terms named in `terms`, as in `settings.ImitationSettings`, with gradients to the student alone.

    With `guided` both models run with and without the prompt, and what guidance mixes is compared (arXiv 2210.03142).
    `steer(inputs, student's options)` gives the options of the teacher, those of the student, and losses of its own.
    """
    inputs = double_batch(batch) if guided else (batch.noisy, batch.t, batch.context)
    shown, imitated = Features(), Features()
    wants_attention = bool({"attention", "maps", "routing"} & set(terms))
    blocks = (shown, imitated) if "blocks" in terms else (None, None)
    led: dict = {}
    losses: dict[str, Tensor] = {}
    options = student_options(student, batch.budget)
    if steer is not None:
        led, options, losses = steer(inputs, options)
    with torch.no_grad(), keep_blocks(teacher.unet, blocks[0]):
        target = teacher.predict(*inputs, shown.add_to(led) if wants_attention else led)
    with keep_blocks(teacher.unet, blocks[1]), recompute_layers(teacher.unet, checkpointing):
        prediction = teacher.predict(*inputs, imitated.add_to(options) if wants_attention else options)
    if "output" in terms:
        scales = batch.guidance if guided else None
        losses["output"] = relative_error(mix_guidance(prediction, scales), mix_guidance(target, scales))
    if "noise" in terms:
        truth = training_target(batch.latents, batch.noise, batch.t.cpu(), teacher.prediction)
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
