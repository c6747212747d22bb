"""Pixel fidelity of a picture against another: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SIGMA = 1.5


def check_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both pictures in float64, after their shapes were compared."""
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"found pictures of shapes {shapes}, expected two of the same (B, 3, H, W)")
    return first.double(), second.double()


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of pictures (B, 3, H, W) in [0, 1]; infinite for equal ones.

    Raises ValueError when the shapes differ.
    """
    first, second = check_pair(first, second)
    return -10 * (first - second).square().mean((1, 2, 3)).log10()


def blur(images: Tensor) -> Tensor:
    """Gaussian-weighted mean over 11x11 windows that lie inside the picture, (B, 3, H - 10, W - 10)."""
    steps = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    line = torch.exp(-(steps**2) / (2 * SIGMA**2))
    line = (line / line.sum()).expand(3, 1, 1, WINDOW)
    return F.conv2d(F.conv2d(images, line, groups=3), line.mT, groups=3)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (B,), mean over channels, of pictures (B, 3, H, W) in [0, 1].

    Raises ValueError when the shapes differ or a side is below 11 pixels.
    """
    first, second = check_pair(first, second)
    if min(first.shape[2:]) < WINDOW:
        raise ValueError(f"found pictures of {tuple(first.shape[2:])} pixels, expected at least {WINDOW} on each side")
    c1, c2 = 0.01**2, 0.03**2
    mean1, mean2 = blur(first), blur(second)
    var1, var2 = blur(first**2) - mean1**2, blur(second**2) - mean2**2
    covariance = blur(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    structure = (2 * covariance + c2) / (var1 + var2 + c2)
    return (luminance * structure).mean((1, 2, 3))
