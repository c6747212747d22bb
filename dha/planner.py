"""How the keys of a student's layers are spent, worked out once for each size that comes by."""

from collections.abc import Callable

import torch
from torch import Tensor

from .places import KeptPlaces, Places, find_places
from .presets import OWN, Stretch
from .routing import ContextPlan
from .student import Student

Pays = Callable[[int, int, int], bool]  # of a layer's tokens, channels and keys: is a short context faster there?


class Planner:
    """The plans of a student's layers in a stretch, and the places of their tokens.

    Nothing is kept from compiled code: there the plan is a constant of its own, and a tensor made in a CUDA graph is
    overwritten by the next one.
    """

    def __init__(self, student: Student, stretch: Stretch = OWN, pays: Pays | None = None):
        self.student = student if stretch.trained else student.untrain()
        self.stretch, self.pays = stretch, pays
        self.plans: dict[tuple[int, int, int], ContextPlan | None] = {}
        self.places: dict[tuple[ContextPlan, torch.device], KeptPlaces] = {}

    def prepare(self, height: int, width: int, x: Tensor, phase: Tensor | None) -> tuple[ContextPlan, Places] | None:
        """Plan and places of a layer at `phase` (1,) for tokens x (B, height*width, C), None if it is to stay as it is.

        Without a phase the grid stands in the middle of its cells.
        """
        size = (height, width, x.shape[-1])
        if torch.compiler.is_compiling():
            plan = self.plan(*size)
            return None if plan is None else (plan, find_places(plan, phase, x.device))
        if size not in self.plans:
            self.plans[size] = self.plan(*size)
        plan = self.plans[size]
        return None if plan is None else (plan, self.keep_places(plan, x.device).pick(phase))

    def keep_places(self, plan: ContextPlan, device: torch.device) -> KeptPlaces:
        """The places of a plan on a device, made when they are first asked for."""
        key = (plan, device)
        if key not in self.places:
            self.places[key] = KeptPlaces(plan, device)
        return self.places[key]

    def plan(self, height: int, width: int, channels: int) -> ContextPlan | None:
        """The plan of a size; None where every token is a key, or where a short context does not pay."""
        plan = self.student.plan(height, width, self.stretch)
        keys = plan.coarse + plan.chosen
        if keys >= plan.tokens or (self.pays is not None and not self.pays(plan.tokens, channels, keys)):
            return None
        return plan
