"""Whether two pictures are laid out alike, whatever is shown and in which colours."""

import torch.nn.functional as F
from torch import Tensor, nn

from .features import stage_features

STAGE = 3  # of stride 16: 10x10 places, coarse enough for shapes and fine enough for where they are


def self_similarity(net: nn.Module, pictures: Tensor) -> Tensor:
    """Cosines (B, 100, 100) between the features of all places of pictures (B, 3, H, W) in [0, 1]."""
    features = F.normalize(stage_features(net, pictures)[STAGE].flatten(2), dim=1)
    return features.mT @ features


def structure_distance(net: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference (B,) of the self-similarities of pictures (B, 3, H, W).

    The structure distance of Splice (Tumanyan et al. 2022, arXiv 2201.00424) with EfficientNet-lite0 in DINO's place.
    """
    return (self_similarity(net, first) - self_similarity(net, second)).square().mean((1, 2))
