"""How close a picture is to another: PSNR, SSIM and a perceptual distance, for the nodes and the trainer alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 11
SIGMA = 1.5
# of the feature network: its input, and the last block of each resolution, strides 2, 4, 8, 16, 32
SIDE = 160
STAGES = (0, 2, 4, 10, 15)


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


def build_feature_net(network: Any, weights: str | Path) -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights, frozen, on the CPU, from its package's class and weight file."""
    # not from_pretrained: it unpickles without weights_only and prints
    net = network.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def normalise(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> what the network was trained on, (B, 3, 160, 160).

    Raises ValueError for another shape or values outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"found pictures of shape {tuple(images.shape)}, expected (B, 3, H, W)")
    low, high = images.aminmax()
    # written so that NaN fails too
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"found pixels from {low:.3f} to {high:.3f}, expected [0, 1]; clamp or rescale the pictures")
    resized = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return (resized * 255 - 127) / 128


def run_stages(net: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Activations of the five stages, (B, C_s, 80 to 5, 80 to 5), then the 1280-channel head (B, 1280, 5, 5)."""
    hidden = net._swish(net._bn0(net._conv_stem(normalise(images))))
    for number, block in enumerate(net._blocks):
        hidden = block(hidden)
        if number in STAGES:
            yield hidden
    yield net._swish(net._bn1(net._conv_head(hidden)))


def stage_features(net: nn.Module, images: Tensor) -> list[Tensor]:
    """Activations of the five stages, each (B, C_s, h_s, w_s), of pictures (B, 3, H, W) in [0, 1]."""
    return list(run_stages(net, images))[:-1]


def perceptual_distance(net: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """LPIPS without learned weights, (B,): squared distance of unit channel vectors, mean over places and stages.

    Raises ValueError when the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"found shapes {tuple(first.shape)} and {tuple(second.shape)}, expected two of the same")
    pairs = zip(stage_features(net, first), stage_features(net, second), strict=True)
    stages = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in pairs]
    return torch.stack(stages).mean(0)
