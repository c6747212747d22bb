"""Energy of latents in the frequency bands of FCDiffusion (arXiv 2407.03006): coarse layout, shapes, fine detail."""

import torch
from torch import Tensor

from dha.frequency import band_limits, dct2, diagonals

NAMES = ("low", "mid", "high")


def band_energies(latents: Tensor) -> Tensor:
    """Squared DCT coefficients (n, 3) of latents (n, C, h, w) within each band, summed over channels; bands overlap."""
    coefficients = dct2(latents.float()).square().sum(1)
    place = diagonals(*latents.shape[-2:], latents.device)
    energies = []
    for name in NAMES:
        first, last = band_limits(name, *latents.shape[-2:])
        energies.append((coefficients * ((place >= first) & (place <= last))).sum((1, 2)))
    return torch.stack(energies, 1)
