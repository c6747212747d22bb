"""Kernel distance (KID, arXiv:1801.01401) between two sets of picture features."""

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean over random subsets and its standard error."""

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


def estimate_distance(x: Tensor, y: Tensor, subsets: int = 20, size: int = 200, seed: int = 0) -> Estimate:
    """Mean and standard error of the distance over random halves, or subsets of `size` where there are more pictures.

    The error is that of the mean over subsets, which overlap: it does not see how the whole sets were drawn.
    Raises ValueError when there are fewer than four pictures in a set or fewer than two subsets.
    """
    x, y = check_features(x, y)
    size = min(size, len(x) // 2, len(y) // 2)
    if size < 2 or subsets < 2:
        raise ValueError(f"found {len(x)} and {len(y)} pictures in {subsets} subsets, expected at least 4, 4 and 2")
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(subsets):
        picks = [torch.randperm(len(z), generator=generator)[:size].to(z.device) for z in (x, y)]
        draws.append(kernel_distance(x[picks[0]], y[picks[1]]))
    values = torch.tensor(draws, dtype=torch.float64)
    return Estimate(values.mean().item(), (values.std() / subsets**0.5).item())
