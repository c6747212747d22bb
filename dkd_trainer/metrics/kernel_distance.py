"""Kernel distance (KID, arXiv:1801.01401) between two sets of picture features."""

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A value and its standard error."""

    mean: float
    error: float


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Polynomial kernel (<x, y> / D + 1)^3 of features (n, D) and (m, D), (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_off_diagonal(kernel: Tensor) -> Tensor:
    """Mean of a square matrix without its diagonal: no picture is compared with itself, so the estimate has no bias."""
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))


def check_features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64: the three terms are nearly equal, and their difference is lost in float32."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"found features of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (n, D) and (m, D)")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"found {len(x)} and {len(y)} pictures, expected at least 2 in each set")
    return x.double(), y.double()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features (n, D) and (m, D): about 0, on either side, for two sets of one distribution.

    Raises ValueError for shapes that do not match or fewer than two pictures in a set.
    """
    x, y = check_features(x, y)
    within = mean_off_diagonal(cubic_kernel(x, x)) + mean_off_diagonal(cubic_kernel(y, y))
    return (within - 2 * cubic_kernel(x, y).mean()).item()


def jackknife_distance(x: Tensor, y: Tensor, than: Tensor | None = None, groups: int = 10) -> Estimate:
    """The distance of whole sets x (n, D) and y (n, D), and the error that which n pairs were drawn leaves in it.

    Row i of x and of y belong together (same prompt): the delete-a-group jackknife leaves both out. With `than` (n, D)
    it is the change of the distance from that set to x, whose error is far smaller than that of either where the rows
    are pictures of the same prompts and seeds. Raises ValueError for other shapes or fewer than four pictures.
    """
    x, y = check_features(x, y)
    if len(x) != len(y) or len(x) < 4 or (than is not None and than.shape != x.shape):
        raise ValueError(f"found sets of {len(x)} and {len(y)} pictures, expected pairs, and at least 4 of them")
    groups = min(groups, len(x))
    member = torch.arange(len(x)) % groups
    real = cubic_kernel(y, y)
    signed = [(1, x)] if than is None else [(1, x), (-1, than.double())]
    kernels = [(sign, cubic_kernel(z, z), cubic_kernel(z, y)) for sign, z in signed]

    def leave(group: int) -> float:
        kept = (member != group).nonzero()[:, 0]
        pick = torch.meshgrid(kept, kept, indexing="ij")
        common = mean_off_diagonal(real[pick])
        terms = [s * (mean_off_diagonal(own[pick]) + common - 2 * cross[pick].mean()) for s, own, cross in kernels]
        return sum(term.item() for term in terms)

    left = torch.tensor([leave(group) for group in range(groups)], dtype=torch.float64)
    error = ((groups - 1) * (left - left.mean()).square().mean()).sqrt()
    return Estimate(sum(sign * kernel_distance(z, y) for sign, z in signed), error.item())
