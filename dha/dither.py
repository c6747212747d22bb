"""Another token of each cell at another timestep: a fixed grid errs the same way in every step, a moving one cancels.

Each step of a sampling adds its error to the latent. With a fixed grid it is nearly the same in all steps and adds up;
with grids that change it differs, and most of the sum goes away, as rounding errors do in a dithered picture.
"""

import torch
from torch import Tensor

from .routing import ContextPlan

PHASES = 64  # different grids of a size
LAYER_STEP = 39  # between the phases of two layers, whose grids differ as well: 64 times the golden ratio's part, odd
# The plastic number's lattice: neighbouring cells, and rows of them, start at places as different as can be.
DOWN, ACROSS, ONE = 49472, 37345, 65536  # 1/p, 1/p^2 and 1 in 16 bits, p^3 = p + 1


def find_phase(level: Tensor) -> Tensor:
    """A number (1,) from 0 to PHASES - 1 for the noise level, or timestep, of a step, (B,) of which the first counts.

    As good as chance from one level to the next, and the same for all forwards of a step, on every device: it is made
    of the leading 20 bits of a float alone. Nothing is fetched from the device.
    """
    mixed = level[:1].float().view(torch.int32).long() >> 12
    for shift in (16, 15):  # a multiplicative hash, within 32 bits
        mixed = (mixed * 0x45D9F3B) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> shift)
    return mixed % PHASES


def list_phases(phase: Tensor, layers: int) -> Tensor:
    """The phases (layers,) of layers 0, 1, 2, ... where a forward is at `phase` (1,)."""
    return (phase + LAYER_STEP * torch.arange(layers, device=phase.device)) % PHASES


def draw_phases(seed: int, count: int, device: torch.device | None = None) -> Tensor:
    """Independent phases (count,), the same for one seed.

    Two of them may be equal: pairs that never are would have errors that cancel more than a sampling's do.
    """
    return torch.randint(PHASES, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


def dithered_indices(plan: ContextPlan, phase: Tensor) -> Tensor:
    """Token numbers (P, coarse) of the grids at phases (P,): one token of each cell, clipped to the picture.

    Over the phases each token of a cell gets its turn equally often.
    """
    (down, across), (rows, columns) = plan.strides, plan.grid
    row = torch.arange(rows, device=phase.device)[:, None]
    column = torch.arange(columns, device=phase.device)
    start = (row * DOWN + column * ACROSS + (phase * (ONE // PHASES))[:, None, None]) % ONE
    place = start * (down * across) // ONE
    row = (row * down + place // across).clamp(max=plan.height - 1)
    column = (column * across + place % across).clamp(max=plan.width - 1)
    return (row * plan.width + column).flatten(1)
