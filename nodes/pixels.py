"""Pictures that we drew, for ComfyUI."""

import numpy as np
import torch
from PIL import Image


def to_images(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size as ComfyUI's IMAGE (B, H, W, 3) in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]))
