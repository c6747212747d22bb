"""Training-free ways to shorten self-attention's keys, kept as baselines for the ablation."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dha.patch import plain_attention
from dha.routing import ContextPlan, coarse_indices
from dha.sites import SITES

# a builder turns tokens (B, N, C) of an h x w picture into keys and their log-weights; the teacher's attention mass
# (B, N) is computed when it asks for it, so that those which do not are timed without it
Builder = Callable[[Tensor, int, int, Callable[[], Tensor]], tuple[Tensor, Tensor | None]]


def stride_keys(stride: int) -> Builder:
    """One real token per cell (ToDo's nearest down-sampling, but from the middle of the cell)."""

    def build(x, h, w, _mass):
        plan = ContextPlan(h, w, (stride, stride), 0)
        return x.index_select(1, coarse_indices(plan, x.device)), None

    return build


def pool_keys(stride: int) -> Builder:
    """The mean of each cell."""

    def build(x, h, w, _mass):
        grid = x.transpose(1, 2).unflatten(2, (h, w))
        return F.avg_pool2d(grid, stride, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2), None

    return build


def rest_weights(plan: ContextPlan, chosen: Tensor) -> Tensor:
    """How many tokens each grid token stands for, (B, coarse): those of its cell that are not among chosen (B, k)."""
    cells = cell_of_token(plan, chosen.device)
    counts = torch.bincount(cells, minlength=plan.coarse).float()[None]
    taken = torch.zeros(len(chosen), plan.coarse, device=chosen.device)
    return counts - taken.scatter_add_(1, cells[chosen], torch.ones_like(chosen, dtype=taken.dtype))


def cell_of_token(plan: ContextPlan, device: torch.device) -> Tensor:
    """Number of the grid cell (N,) that each token lies in."""
    rows, columns = (
        torch.arange(size, device=device) // stride
        for stride, size in zip(plan.strides, (plan.height, plan.width), strict=True)
    )
    return (rows[:, None] * plan.grid[1] + columns).flatten()


def grid_and_chosen(stride: int, share: float, by: str, weighted: bool = True) -> Builder:
    """A strided grid plus a share of all tokens, chosen `random`ly or by attention `mass`."""

    def build(x, h, w, mass):
        plan = ContextPlan(h, w, (stride, stride), max(1, round(share * h * w)))
        scores = mass() if by == "mass" else torch.rand(x.shape[:2], device=x.device)
        chosen = scores.topk(plan.chosen, dim=1).indices
        keys = torch.cat(
            [
                x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])),
                x.index_select(1, coarse_indices(plan, x.device)),
            ],
            1,
        )
        if not weighted:
            return keys, None
        rest = rest_weights(plan, chosen).log()
        return keys, torch.cat([torch.zeros_like(chosen, dtype=rest.dtype), rest], 1)

    return build


def attention_mass(attention: torch.nn.Module, x: Tensor) -> Tensor:
    """Mean attention (B, N) that each token receives from all others, x (B, N, C)."""
    q, k = (f(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for f in (attention.to_q, attention.to_k))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))


def builder_options(teacher, builder: Builder, levels: tuple[int, ...]) -> dict:
    """`transformer_options` that run a builder at the given levels of a teacher's UNet."""
    sites = {site.block: site for site in SITES if site.level in levels}

    def shorten(n, context, value, options):
        site = sites.get(options["block"])
        options["bias"] = None
        if site is None:
            return n, context, value
        measure = partial(attention_mass, teacher.attention(site), context)
        keys, options["bias"] = builder(context, *options["activations_shape"][-2:], measure)
        return n, keys, keys

    def attend(q, k, v, options):
        bias = options["bias"]
        return plain_attention(q, k, v, options, None if bias is None else bias[:, None, None].to(q.dtype))

    return {"patches": {"attn1_patch": [shorten]}, "patches_replace": {"attn1": {block: attend for block in sites}}}


def window_options(parts: int, levels: tuple[int, ...]) -> dict:
    """Attention inside windows alone, `parts` of them down and across at each of the given levels.

    Raises ValueError while it runs at a size that does not divide.
    """

    def attend(q, k, v, options):
        h, w = options["activations_shape"][-2:]
        if h % parts or w % parts:
            raise ValueError(f"a level of {h}x{w} tokens cannot be cut into {parts}x{parts} windows; use another size")

        def cut(x):
            windows = x.unflatten(1, (parts, h // parts, parts, w // parts)).transpose(2, 3)
            return windows.reshape(-1, h * w // parts**2, x.shape[-1])

        out = plain_attention(cut(q), cut(k), cut(v), options, None)
        out = out.reshape(len(q), parts, parts, h // parts, w // parts, -1).transpose(2, 3)
        return out.reshape(len(q), h * w, -1)

    blocks = [site.block for site in SITES if site.level in levels]
    return {"patches_replace": {"attn1": {block: attend for block in blocks}}}


def removed_options(levels: tuple[int, ...]) -> dict:
    """Every token attends to itself alone, at the given levels: what losing all mixing costs."""
    blocks = [site.block for site in SITES if site.level in levels]
    return {"patches_replace": {"attn1": {block: lambda q, k, v, options: v for block in blocks}}}
