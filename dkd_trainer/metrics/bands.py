"""Energy of latents in the frequency bands of FCDiffusion (arXiv 2407.03006): coarse layout, shapes, fine detail."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dha.frequency import BANDS, band_limits, dct2, diagonals

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


def band_fidelity(latents: Tensor, source: Tensor) -> Tensor:
    """Cosines (n, 4) between the DCT coefficients of latents and sources (n, C, h, w) in the bands of `BANDS`.

    1 is the source's band up to a factor, 0 has nothing to do with it. The mini band is compared as it is shown to a
    control, without its order: the coefficients of a diagonal are sorted first.
    """
    pairs = [dct2(each.float()) for each in (latents, source)]
    return torch.stack([F.cosine_similarity(*(pick_band(each, name) for each in pairs)) for name in BANDS], 1)


def pick_band(coefficients: Tensor, band: str) -> Tensor:
    """A band's coefficients (n, k) of (n, C, h, w)."""
    first, last = band_limits(band, *coefficients.shape[-2:])
    place = diagonals(*coefficients.shape[-2:], coefficients.device)
    if band != "mini":
        return coefficients[..., (place >= first) & (place <= last)].flatten(1)
    totals = range(int(min(last, place.max())) + 1)
    return torch.cat([coefficients[..., place == total].sort(-1).values.flatten(1) for total in totals], 1)
