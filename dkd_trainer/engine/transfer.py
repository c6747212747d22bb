"""Stage 1, attention transfer: every replaced layer learns its teacher's output from its teacher's input."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dha.dither import draw_phases
from dha.official import OfficialSite
from dha.places import list_places
from dha.presets import Stretch
from dha.sites import Site
from dha.student import Student

from ..host import Teacher
from .attention import trained_attention

ROUTING_QUERIES = 64  # queries from which the teacher's attention mass per key is estimated


def transfer_losses(
    teacher: Teacher,
    student: Student,
    noisy: Tensor,
    t: Tensor,
    context: Tensor,
    budget: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    spread: float = 1.0,
) -> dict[str, Tensor]:
    """`joint_error` of each site's output, as `site name`, and the router's loss, as `site name/routing`.

    The teacher's trunk runs without gradients; noisy (B, 4, h, w), t (B,), context (B, 77, C). `seed` picks the grids
    and the queries that the router's loss looks at. `options` are of the teacher's forward: a control's, for one that
    is steered.
    """
    losses: dict[str, Tensor] = {}
    patches = watch_sites(student, teacher.attention, losses, budget, seed, spread)
    patches["attn1_output_patch"].append(stop_after(student.list_sites()[-1].block))
    options = dict(options or {})
    with torch.no_grad(), contextlib.suppress(AllSeen):
        teacher.predict(noisy, t, context, {**options, "patches": {**options.get("patches", {}), **patches}})
    return losses


class AllSeen(Exception):
    """The rest of a teacher's forward would show nothing more."""


def stop_after(block: tuple[str, int]) -> Callable:
    """A patch of self-attention outputs that raises AllSeen at a block."""

    def stop(out, options):
        if options["block"] == block:
            raise AllSeen
        return out

    return stop


def watch_sites(
    student: Student,
    find_attention: Callable[[Site], nn.Module],
    losses: dict[str, Tensor],
    budget: float | None = None,
    seed: int = 0,
    spread: float = 1.0,
) -> dict[str, list[Callable]]:
    """Patches for a forward of the teacher's layers that put `transfer_losses` into `losses`.

    `find_attention(site)` is the self-attention whose output is learnt.
    """
    sites = {site.block: site for site in student.list_sites()}
    generator = torch.Generator().manual_seed(seed)

    @cache
    def draw_all(device: torch.device) -> dict[tuple[str, int], Tensor]:
        """The phases (count,) of every site, in one copy: each waits for all that the device has to do."""
        drawn = torch.stack([draw_phases(seed + number, count_grids(spread)) for number in range(len(sites))])
        return dict(zip(sites, drawn.to(device), strict=True))

    def keep_embedding(emb, _channels, options):
        options["dkd_embedding"] = emb
        return emb

    def keep_input(n, context, value, options):
        options["dkd_input"] = n
        return n, context, value

    def compare_output(out, options):
        site = sites.get(options["block"])
        if site is None:
            return out
        x, emb = options["dkd_input"], options["dkd_embedding"]
        module, attention = student.site(site), find_attention(site)
        plan = student.plan(*options["activations_shape"][-2:], Stretch(budget))
        if isinstance(module, OfficialSite):
            with torch.enable_grad():
                losses[site.name] = relative_error(module(x, emb), out)
        elif plan.coarse + plan.chosen < plan.tokens:
            with torch.enable_grad():
                places = list_places(plan, draw_all(x.device)[site.block])
                outputs = module.run_places(attention, trained_attention, x, emb, plan, attention.heads, places)
                losses[site.name] = joint_error(outputs, out, spread)
                if plan.chosen:
                    scores = module.router(x, emb)
                    losses[f"{site.name}/routing"] = routing_loss(scores, attention, x, generator)
        return out

    return {"emb_patch": [keep_embedding], "attn1_patch": [keep_input], "attn1_output_patch": [compare_output]}


def count_grids(spread: float) -> int:
    """How many grids a loss looks at: a second one tells apart what changes with the grid and what does not."""
    return 1 if spread == 1 else 2


def joint_error(outputs: Sequence[Tensor], target: Tensor, spread: float) -> Tensor:
    """Mean over the batch of (<d, d'> + spread (|d|^2 - <d, d'>)) / |target|^2, any shape (B, ...).

    d and d' are the differences of one or two outputs, made with different grids, to the target. Their product is what
    they have in common, on average the squared error of the mean over all grids; the rest mostly cancels while grids
    change from step to step, and counts for `spread`. Where the first output alone has gradients, they are those of
    both on average: the two are alike, and may change places.
    """
    differences = [(output.float() - target.float()).flatten(1) for output in outputs]
    whole = sum(difference.square().sum(1) for difference in differences) / len(differences)
    common = (differences[0] * differences[-1]).sum(1)
    error = common + spread * (whole - common)
    if not differences[-1].requires_grad:
        error = 2 * error - error.detach()
    return (error / target.float().flatten(1).square().sum(1).clamp(min=1e-8)).mean()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of |output - target|^2 / |target|^2, any shape (B, ...)."""
    return joint_error([output], target, 1.0)


def routing_loss(
    scores: Tensor, attention: torch.nn.Module, x: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Cross-entropy of the router's softmax (B, N) against the attention mass that the teacher's keys receive."""
    with torch.no_grad():
        picks = torch.randperm(x.shape[1], generator=generator)[:ROUTING_QUERIES].to(x.device)
        q, k = attention.to_q(x[:, picks]), attention.to_k(x)
        q, k = (a.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for a in (q, k))
        mass = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1).mean((1, 2))
    cross_entropy = -(mass * scores.float().log_softmax(1)).sum(1)
    return (
        cross_entropy + (mass * mass.clamp(min=1e-12).log()).sum(1)
    ).mean()  # minus the mass's own entropy: 0 is perfect
