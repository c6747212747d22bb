"""Landmarks: a few queries look at all keys, and what the short context missed there is carried over to all queries.

Queries that lie near each other miss nearly the same: the error of a short context is a smooth function of the query,
however rough the attention itself is. Landmarks l are the queries of evenly spaced tokens. Of them the error
e = attention(l, all) - attention(l, short) is known, and kernel ridge regression says it for every query q:

    out(q) = attention(q, short) + phi(q) (phi(l) + RIDGE I)^-1 e,    phi(q) = softmax(<q, l - l'> / (WIDTH var(l)))

with l' their mean. phi(q) is an attention as well, to keys made of landmarks and to values that solve a small system,
so that all of it runs on the user's own kernel. Landmarks as in Nystromformer (arXiv 2102.03902), where they stand for
all queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LANDMARKS = 64  # at most, where nothing else is said
WIDTH = 0.5  # of the kernel, in variances of the landmarks
RIDGE = 0.003


def choose_step(height: int, width: int, most: int) -> int:
    """How many tokens lie between two landmarks, so that at most `most` cover height x width tokens evenly.

    From one row to the next they shift by nearly the golden section: they would stand in columns otherwise.
    """
    least = -(-height * width // most)
    return min([(unevenness(step, width), step) for step in range(least, least + least // 4 + 1)])[1]


def unevenness(step: int, width: int) -> float:
    """How far a step's shift from row to row is from the golden section, of the row or of the step."""
    shift = step % width / width if step >= width else width % step / step
    return round(min(abs(shift - 0.382), abs(shift - 0.618)), 3)


def pick_landmarks(q: Tensor, step: int) -> Tensor:
    """Every `step`-th of queries (B, N, C), nothing copied."""
    return q[:, step // 2 :: step]


def carry_missed(attend: Callable, q: Tensor, k: Tensor, v: Tensor, near: Tensor, step: int, heads: int) -> Tensor:
    """What q (B, N, C) would see of all k and v (B, N, C), from what they see `near` (B, N, C), in a short context.

    `attend(q, k, v)` is an attention of `heads` heads that divides logits by the root of a head's width. Without
    gradients `near` is written into.
    """
    marks = pick_landmarks(q, step)
    missed = attend(marks, k, v) - pick_landmarks(near, step)
    carried = attend(q, *solve_carriers(marks, missed, heads))
    return near + carried if near.requires_grad else near.add_(carried)


def solve_carriers(marks: Tensor, missed: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, L, C) with which attention says at landmarks (B, L, C) what was `missed` (B, L, C) there.

    Solved in fp32, without asking the device whether it could be: phi(l) is exp(<l, l>) with its rows scaled, no
    eigenvalue of which is below zero, so that with the ridge it can.
    """
    with torch.autocast(marks.device.type, enabled=False):
        points, errors = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (marks, missed))
        keys = points - points.mean(2, keepdim=True)
        keys = keys / (WIDTH * keys.square().sum(-1).mean(-1)[..., None, None]).clamp(min=1e-6)
        mean = errors.mean(2, keepdim=True)
        weights = (points @ keys.transpose(-1, -2)).softmax(-1)
        system = weights + RIDGE * torch.eye(points.shape[2], device=marks.device)
        values = torch.linalg.solve_ex(system, errors - mean).result + mean
        keys = keys * points.shape[-1] ** 0.5
        keys, values = (x.transpose(1, 2).flatten(2).to(marks.dtype) for x in (keys, values))
    return keys, values
