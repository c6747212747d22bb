"""Landmarks: a few queries look at all keys, and what the short context missed there is carried over to all queries.

Queries that lie near each other miss nearly the same: the error of a short context is a smooth function of the query,
however rough the attention itself is. Landmarks l are the queries of evenly spaced tokens. Of them the error
e = attention(l, all) - attention(l, short) is known, and kernel ridge regression says it for every query q:

    out(q) = attention(q, short) + phi(q) (phi(l) + RIDGE I)^-1 e,    phi(q) = softmax(q M (l - l') / (WIDTH far))

with l' their mean and the metric M, the root of the covariance of their keys: what keys do not differ in tells no
queries apart. (The short context's keys change with its grid: a metric of theirs goes with the error, which then does
not cancel from one grid to the next.) `far` is the square of the longest way from l' to a landmark: were it the mean
one, a single landmark far out would draw all queries to itself. phi(q) is an attention as well, to keys made of
landmarks and to values that solve a small system, so that all of it runs on whatever kernel there is. Landmarks as in
Nystromformer (arXiv 2102.03902), where they stand for all queries.

The error falls with about the -0.6th power of the number of keys and the -0.45th of that of landmarks, each of which
costs a query what two keys cost: from some three keys to a landmark on, further keys are better spent on further
landmarks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LANDMARKS = 64  # where nothing else is said
KEYS_EACH = 4  # beside many keys there is a landmark to as many of them,
GROWTH = 2.5  # up to so many times as many as were said
STEP = 32  # of which their number is then a multiple: softmax likes such rows, MKL is slow with 130 to 148 equations
GOLDEN, ONE = 40503, 65536  # the golden section and 1 in 16 bits
WIDTH = 0.2  # of the kernel, in squares of the way to the farthest landmark
RIDGE = 0.0003
# The root of x on 0 to 1 up to its fifth Chebyshev polynomial, by powers of x; at 0 it is 0.058.
ROOT = (0.0579, 3.4725, -10.8032, 20.7422, -19.0489, 6.5848)


def count_landmarks(least: int, keys: int, tokens: int) -> int:
    """How many of a layer's queries are landmarks: `least`, or a multiple of STEP above that beside many keys.

    In a small layer there are none.
    """
    if 2 * least > tokens:
        return 0
    most = min(keys // KEYS_EACH, int(GROWTH * least), tokens // 4)
    return max(least, most // STEP * STEP)


def place_landmarks(height: int, width: int, count: int, device: torch.device | None = None) -> Tensor:
    """The numbers (count,) of evenly spread tokens of height x width, at most a quarter of them.

    A Fibonacci lattice: as many to each row, one golden section of it from the next.
    """
    numbers = torch.arange(count, device=device)
    row = (2 * numbers + 1) * height // (2 * count)
    column = numbers * GOLDEN % ONE * width // ONE
    return row * width + column


def carry_missed(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, nears: Sequence[Tensor], marks: Tensor, heads: int
) -> list[Tensor]:
    """What q (B, M, C) would see of all k and v (B, N, C), from what they see, `nears` (B, M, C), in short contexts.

    `marks` (L,) are the landmarks' numbers, of N; where queries were merged to M fewer, they stand as far along these.
    `attend(q, k, v)` is an attention of `heads` heads that divides logits by the root of a head's width. Without
    gradients each of `nears` is written into.
    """
    seen = k.index_select(1, marks)
    if q.shape[1] != k.shape[1]:
        marks = marks * q.shape[1] // k.shape[1]
    points = q.index_select(1, marks)
    exact = attend(points, k, v)
    keys, *values = solve_carriers(points, seen, [exact - near.index_select(1, marks) for near in nears], heads)
    return [add_to(near, attend(q, keys, value)) for near, value in zip(nears, values, strict=True)]


def add_to(near: Tensor, carried: Tensor) -> Tensor:
    """Their sum, written into `near` where no gradient needs it as it was."""
    return near + carried if near.requires_grad else near.add_(carried)


def solve_carriers(points: Tensor, seen: Tensor, missed: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """Keys (B, L, C) and, for each of `missed` (B, L, C), values (B, L, C): attention to them at landmarks says it.

    `points` (B, L, C) are the landmarks, `seen` (B, L, C) their keys, whose metric it is. Solved in fp32, whatever the
    precision around it. The tensors are small, so that what counts is how many operations there are: parts are handled
    together.
    """
    dtype, width = points.dtype, points.shape[-1] // heads
    with torch.autocast(points.device.type, enabled=False):
        parts = torch.stack([points, seen, *missed]).unflatten(-1, (heads, width)).transpose(2, 3)
        parts = parts.to(torch.float32, memory_format=torch.contiguous_format).flatten(1, 2)
        means = parts.mean(-2, keepdim=True)
        centred = parts - means
        offsets, spread, errors = centred[0], centred[1], centred[2:]
        keys = offsets @ find_metric(spread)
        lengths = (offsets * keys).sum(-1, keepdim=True)
        far = lengths.amax(-2, keepdim=True).clamp(min=1e-6)
        keys, lengths = keys / far, lengths / far
        values = solve_softmax(offsets, means[0], keys, lengths, errors, means[2:])
        carriers = torch.cat([(keys * (width**0.5 / WIDTH))[None], values]).unflatten(1, (-1, heads)).transpose(2, 3)
        return carriers.to(dtype, memory_format=torch.contiguous_format).flatten(-2).unbind()


def find_metric(spread: Tensor) -> Tensor:
    """A root (G, c, c) of the covariance of keys without their mean (G, m, c), as far as a polynomial is one.

    Matrix products alone. Its floor: a direction in which keys do not differ counts for little, and not for nothing.
    """
    covariance = spread.mT @ spread
    covariance = covariance / torch.linalg.vector_norm(covariance, dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    one = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    metric = torch.add(ROOT[-2] * one, covariance, alpha=ROOT[-1])
    for coefficient in ROOT[-3::-1]:
        metric = torch.baddbmm(one, metric, covariance, beta=coefficient)
    return metric


def solve_softmax(
    offsets: Tensor, middle: Tensor, keys: Tensor, lengths: Tensor, errors: Tensor, mean: Tensor
) -> Tensor:
    """Values with (P + RIDGE I) (values - mean) = errors (any, G, L, c), P = softmax((offsets + middle) keys' / WIDTH).

    `mean` (any, G, 1, c) is that of the values, `keys` (G, L, c) are `offsets` (G, L, c) times a symmetric metric and
    `lengths` (G, L, 1) their products with them, so that P = G F / Z with Gaussians G = exp(-|x - x'|^2 / (2 WIDTH)) in
    it, factors F of its columns and sums Z of its rows. What is solved is (G + RIDGE Z / F) F values = Z errors:
    symmetric and, with RIDGE or more on its diagonal, positive, so that no device needs to be asked whether it could
    be.
    """
    gaussians = torch.baddbmm(lengths + lengths.mT, keys, offsets.mT, beta=-0.5 / WIDTH, alpha=1 / WIDTH).exp()
    factors = torch.baddbmm(lengths, keys, middle.mT, beta=0.5 / WIDTH, alpha=1 / WIDTH)
    factors = factors.softmax(-2).clamp(min=1e-26)
    sums = gaussians @ factors
    one = torch.eye(lengths.shape[1], dtype=lengths.dtype, device=lengths.device)
    system = torch.addcdiv(gaussians, one * sums, factors, value=RIDGE)
    return torch.addcdiv(mean, solve_positive(system, sums * errors), factors)


def solve_positive(system: Tensor, right: Tensor) -> Tensor:
    """What times a positive `system` (G, L, L) makes `right` (any, G, L, c), by Cholesky.

    Gradients go through a step of refinement, which costs them one more solution; through the factorisation they would
    cost several of the system's own size.
    """
    columns = right.permute(1, 2, 0, 3).flatten(2)
    divide = factorise(system.detach())
    solved = divide(columns.detach())
    if columns.requires_grad or system.requires_grad:
        solved = solved + divide(columns - system @ solved)
    return solved.unflatten(2, (len(right), -1)).permute(2, 0, 1, 3)


def factorise(system: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that divides (G, L, any) by a positive `system` (G, L, L).

    On Apple's GPUs PyTorch has that in its latest versions alone: there the processor does it.
    """
    device = system.device
    lower = torch.linalg.cholesky_ex(system.cpu() if device.type == "mps" else system).L

    def divide(right: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(lower, right.to(lower.device), upper=False)
        return torch.linalg.solve_triangular(lower.mT, half, upper=True).to(device)

    return divide
