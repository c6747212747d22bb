"""Landmarks: a few queries look at all keys, and what the short context missed there is carried over to all queries.

Queries that lie near each other miss nearly the same: the error of a short context is a smooth function of the query,
however rough the attention itself is. Landmarks l are the queries of evenly spaced tokens. Of them the error
e = attention(l, all) - attention(l, short) is known, and kernel ridge regression says it for every query q:

    out(q) = attention(q, short) + phi(q) (phi(l) + RIDGE I)^-1 e,    phi(q) = softmax(q M (l - l') / (WIDTH var))

with l' their mean and var their variance in the metric M, the root of the covariance of their keys: what keys do not
differ in tells no queries apart. (The short context's keys change with its grid: a metric of theirs goes with the
error, which then does not cancel from one grid to the next.) phi(q) is an attention as well, to keys made of landmarks
and to values that solve a small system, so that all of it runs on the user's own kernel. Landmarks as in Nystromformer
(arXiv 2102.03902), where they stand for all queries.

The error falls with about the -0.6th power of the number of keys and the -0.45th of that of landmarks, each of which
costs a query what two keys cost: from some three keys to a landmark on, further keys are better spent on further
landmarks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LANDMARKS = 64  # where nothing else is said
KEYS_EACH = 4  # more keys than that to a landmark have more landmarks,
GROWTH = 2.5  # up to so many times as many
GOLDEN, ONE = 40503, 65536  # the golden section and 1 in 16 bits
WIDTH = 0.5  # of the kernel, in variances of the landmarks
RIDGE = 0.001
FLOOR = 0.2  # of the metric, in its mean: no direction counts for less
ROUNDS = 4  # of Newton's way to a root


def count_landmarks(least: int, keys: int, tokens: int) -> int:
    """How many of a layer's queries are landmarks: `least`, or more beside many keys; 0 in a small layer."""
    if 2 * least > tokens:
        return 0
    return max(least, min(keys // KEYS_EACH, int(GROWTH * least), tokens // 4))


def place_landmarks(height: int, width: int, count: int, device: torch.device | None = None) -> Tensor:
    """The numbers (count,) of evenly spread tokens of height x width, at most a quarter of them.

    A Fibonacci lattice: as many to each row, one golden section of it from the next.
    """
    numbers = torch.arange(count, device=device)
    row = (2 * numbers + 1) * height // (2 * count)
    column = numbers * GOLDEN % ONE * width // ONE
    return row * width + column


def carry_missed(attend: Callable, q: Tensor, k: Tensor, v: Tensor, near: Tensor, marks: Tensor, heads: int) -> Tensor:
    """What q (B, M, C) would see of all k and v (B, N, C), from what they see `near` (B, M, C), in a short context.

    `marks` (L,) are the landmarks' numbers, of N; where queries were merged to M fewer, they stand as far along these.
    `attend(q, k, v)` is an attention of `heads` heads that divides logits by the root of a head's width. Without
    gradients `near` is written into.
    """
    seen = k.index_select(1, marks)
    if q.shape[1] != k.shape[1]:
        marks = marks * q.shape[1] // k.shape[1]
    points, short = (x.index_select(1, marks) for x in (q, near))
    carried = attend(q, *solve_carriers(points, seen, attend(points, k, v) - short, heads))
    return near + carried if near.requires_grad else near.add_(carried)


def solve_carriers(points: Tensor, seen: Tensor, missed: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, L, C) with which attention says at landmarks (B, L, C) what was `missed` (B, L, C) there.

    `seen` (B, any, C) are keys, whose metric it is. Solved in fp32, whatever the precision around it.
    """
    dtype = points.dtype
    with torch.autocast(points.device.type, enabled=False):
        points, seen, errors = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (points, seen, missed))
        middle = points.mean(2, keepdim=True)
        offsets = points - middle
        keys = offsets @ find_metric(seen)
        keys = keys / (WIDTH * (offsets * keys).sum(-1).mean(-1)[..., None, None]).clamp(min=1e-6)
        mean = errors.mean(2, keepdim=True)
        values = solve_softmax(offsets, middle, keys, errors - mean) + mean
        keys = keys * points.shape[-1] ** 0.5
        keys, values = (x.transpose(1, 2).flatten(2).to(dtype) for x in (keys, values))
    return keys, values


def find_metric(seen: Tensor) -> Tensor:
    """The root (..., c, c) of the covariance of keys (..., m, c), of mean 1 on its diagonal, and `FLOOR`.

    By the iteration of Newton and Schulz, matrix products alone. After few rounds the small directions are still
    shorter than in the root.
    """
    spread = (seen - seen.mean(-2, keepdim=True)).flatten(0, -3)
    root = spread.transpose(-1, -2) @ spread
    root = root / torch.linalg.matrix_norm(root, keepdim=True).clamp(min=1e-6)
    one = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    step = inverse = 1.5 * one - 0.5 * root
    root = root @ step
    for _ in range(ROUNDS - 1):
        step = torch.baddbmm(one, inverse, root, beta=1.5, alpha=-0.5)
        root, inverse = root @ step, step @ inverse
    metric = root / root.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-6) + FLOOR * one
    return metric.unflatten(0, seen.shape[:-2])


def solve_softmax(offsets: Tensor, middle: Tensor, keys: Tensor, errors: Tensor) -> Tensor:
    """Values (..., L, c) with (P + RIDGE I) values = errors, P = softmax((offsets + middle) keys'), all (..., L, c).

    `keys` are `offsets` times a symmetric metric, so that P = G F / Z with Gaussians G = exp(-|x - x'|^2 / 2) in it,
    factors F of its columns and sums Z of its rows. What is solved is (G + RIDGE Z / F) F values = Z errors: symmetric
    and, with RIDGE or more on its diagonal, positive, so that no device needs to be asked whether it could be.
    """
    products = offsets @ keys.transpose(-1, -2)
    half = products.diagonal(dim1=-2, dim2=-1) / 2
    gaussians = (products - half[..., None, :] - half[..., None]).exp()
    factors = half[..., None] + keys @ middle.transpose(-1, -2)
    factors = (factors - factors.amax(-2, keepdim=True)).clamp(min=-60).exp()
    sums = gaussians @ factors
    system = gaussians + torch.diag_embed((RIDGE * sums / factors)[..., 0])
    return torch.cholesky_solve(sums * errors, torch.linalg.cholesky_ex(system).L) / factors
