"""Frequencies of a latent: the orthonormal 2-D DCT and the four bands of FCDiffusion (arXiv 2407.03006)."""

import functools
import math

import torch
from torch import Tensor

# first and last i + j that a band keeps, for a 64x64 latent; None is no bound
BANDS: dict[str, tuple[int, int | None]] = {"mini": (0, 10), "low": (0, 30), "mid": (20, 40), "high": (50, None)}
SIDE = 64  # of the latents that these numbers are for


@functools.lru_cache(maxsize=32)
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II (size, size): row k holds sqrt(2/size) cos(pi (2n+1) k / (2 size)), row 0 sqrt(1/size)."""
    with torch.inference_mode(False), torch.no_grad():  # one made in inference mode could not be trained through later
        n = torch.arange(size, dtype=torch.float64)
        matrix = (math.pi / size * (n + 0.5) * n[:, None]).cos() * (2 / size) ** 0.5
        matrix[0] /= 2**0.5
        return matrix.to(device, dtype)


def dct2(x: Tensor) -> Tensor:
    """DCT-II over the last two dimensions (..., h, w), in at least fp32; the result is of x's type."""
    down, across = (dct_matrix(size, computed_type(x), x.device) for size in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        return (down @ x.to(down.dtype) @ across.mT).to(x.dtype)


def idct2(x: Tensor) -> Tensor:
    """The inverse of `dct2`."""
    down, across = (dct_matrix(size, computed_type(x), x.device) for size in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        return (down.mT @ x.to(down.dtype) @ across).to(x.dtype)


def computed_type(x: Tensor) -> torch.dtype:
    """Half precision would lose the small coefficients beside the large ones of the same sum."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def band_limits(band: str, height: int, width: int, scaled: bool = True) -> tuple[float, float]:
    """First and last i + j that a band keeps: `scaled` by (h + w) / 128, otherwise as for a 64x64 latent.

    Raises ValueError for an unknown band.
    """
    if band not in BANDS:
        raise ValueError(f"unknown frequency band {band!r}, expected one of {', '.join(BANDS)}")
    first, last = BANDS[band]
    scale = (height + width) / (2 * SIDE) if scaled else 1.0
    return first * scale, math.inf if last is None else last * scale


def diagonals(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """i + j of every coefficient, (h, w)."""
    return torch.arange(height, device=device)[:, None] + torch.arange(width, device=device)


def band_mask(band: str, height: int, width: int, scaled: bool = True, device: torch.device | None = None) -> Tensor:
    """Which coefficients a band keeps, bool (h, w); raises ValueError for an unknown band."""
    first, last = band_limits(band, height, width, scaled)
    place = diagonals(height, width, device)
    return (place >= first) & (place <= last)


def filter_band(z: Tensor, band: str, seed: int = 0, scaled: bool = True) -> Tensor:
    """What a band keeps of latents z (B, C, h, w); `mini` also shuffles each diagonal by `seed`.

    Raises ValueError for an unknown band.
    """
    height, width = z.shape[-2:]
    kept = dct2(z.to(computed_type(z))) * band_mask(band, height, width, scaled, z.device)
    if band == "mini":
        last = band_limits(band, height, width, scaled)[1]
        order = shuffle_diagonals(height, width, last, seed).to(z.device)
        kept = kept.flatten(-2)[..., order].view(kept.shape)
    return idct2(kept).to(z.dtype)


def shuffle_diagonals(height: int, width: int, last: float, seed: int) -> Tensor:
    """Where each coefficient (h * w,) comes from when every diagonal up to `last` is permuted within itself.

    One permutation for all channels and samples, drawn on the CPU: the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(height * width)
    for total in range(min(int(last), height + width - 2) + 1):
        rows = torch.arange(max(0, total - width + 1), min(total, height - 1) + 1)
        places = rows * width + (total - rows)
        order[places] = places[torch.randperm(len(places), generator=generator)]
    return order
