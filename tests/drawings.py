"""Pictures that tests of metrics look at, and ways to spoil them."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


def draw_gradients(count: int, seed: int = 0, size: int = 64) -> torch.Tensor:
    """Smooth random pictures (count, 3, size, size) in [0, 1]."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)


def draw_shapes(count: int, seed: int = 0, size: int = 128) -> torch.Tensor:
    """Pictures (count, 3, size, size) of flat shapes with sharp edges."""
    rng = random.Random(seed)
    sheets = []
    for _ in range(count):
        sheet = Image.new("RGB", (size, size), tuple(rng.choices(range(256), k=3)))
        pen = ImageDraw.Draw(sheet)
        for _ in range(12):
            left, top, side = rng.randrange(size), rng.randrange(size), rng.randrange(4, size // 2)
            shape = rng.choice([pen.ellipse, pen.rectangle])
            shape([left, top, left + side, top + side], fill=tuple(rng.choices(range(256), k=3)))
        sheets.append(np.asarray(sheet))
    return torch.from_numpy(np.stack(sheets)).permute(0, 3, 1, 2) / 255


def halve_resolution(images: torch.Tensor) -> torch.Tensor:
    """Averaged to half the size and enlarged again."""
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")


def add_noise(images: torch.Tensor, level: float) -> torch.Tensor:
    """White noise of the given standard deviation, clamped to [0, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return (images + level * noise).clamp(0, 1)
