"""Where those tokens of a layer stand that nobody chooses: its grid, which moves with the phase, and its landmarks."""

from typing import NamedTuple

import torch
from torch import Tensor

from .dither import PHASES, dithered_indices
from .landmarks import place_landmarks
from .routing import ContextPlan, coarse_indices


class Places(NamedTuple):
    """Token numbers of the grid (coarse,) and of the landmarks (L,); None where a plan has none."""

    grid: Tensor | None
    marks: Tensor | None


def list_places(plan: ContextPlan, phases: Tensor) -> list[Places]:
    """The places at each of the phases (P,); a single one where a plan has no grid."""
    grids = dithered_indices(plan, phases) if plan.coarse else [None]
    marks = find_marks(plan, phases.device)
    return [Places(grid, marks) for grid in grids]


def find_places(plan: ContextPlan, phase: Tensor | None, device: torch.device) -> Places:
    """The places at `phase` (1,); without one the grid's tokens stand in the middle of their cells."""
    if phase is not None:
        return list_places(plan, phase)[0]
    return Places(coarse_indices(plan, device) if plan.coarse else None, find_marks(plan, device))


def find_marks(plan: ContextPlan, device: torch.device) -> Tensor | None:
    """The landmarks (L,) of a plan, which are always the same."""
    return place_landmarks(plan.height, plan.width, plan.landmarks, device) if plan.landmarks else None


class KeptPlaces:
    """All places of a plan on one device, so that a step costs a look-up."""

    def __init__(self, plan: ContextPlan, device: torch.device):
        with torch.inference_mode(False):  # they are kept for later calls, of which some may train
            middle, self.marks = find_places(plan, None, device)
            moving = None if middle is None else dithered_indices(plan, torch.arange(PHASES, device=device))
            self.grids = None if middle is None else torch.cat([moving, middle[None]])

    def pick(self, phase: Tensor | None) -> Places:
        """Those at `phase` (1,), None for the middle; nothing is fetched from the device."""
        if self.grids is None:
            return Places(None, self.marks)
        grid = self.grids[-1] if phase is None else self.grids.index_select(0, phase.to(self.grids.device))[0]
        return Places(grid, self.marks)
