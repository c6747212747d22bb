"""A finished control on a bare teacher: its merged weights, and options that steer by source pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dha.control import FCNet, Pair, control_options
from dha.control_file import ControlConfig, ControlFile, check_control, load_control
from dha.control_weights import ENCODER, merge_weights
from dha.frequency import filter_band

from ..host import Teacher
from .branch import build_branch


class FrozenBranch:
    """A control's file with its branch on a teacher; raises ControlFileError when the two do not fit."""

    def __init__(self, name: str, control: ControlFile, teacher: Teacher):
        self.name, self.control, self.branch = name, control, build_frozen(teacher, control.config)
        check_control(name, control, self.branch, teacher.architecture)
        state = teacher.unet.state_dict()
        base = {name: tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        weights = {name: tensor.to(teacher.device) for name, tensor in control.weights.items()}
        self.branch.load_state_dict(merge_weights(base, weights))

    @property
    def band(self) -> str:
        return self.control.config.band

    def fit(self, teacher: Teacher) -> FCNet:
        """The branch, or for a teacher of other widths an untrained one, which is as fast."""
        same = teacher.architecture == self.control.architecture
        return self.branch if same else build_frozen(teacher, self.control.config)

    def as_options(
        self, teacher: Teacher, sources: Tensor, strength: float = 1.0, seed: int = 0, inner: dict | None = None
    ) -> dict[str, Any]:
        """`transformer_options` that steer a teacher by sources (B, 4, h, w), in turn for batches that are larger.

        `inner` are the options of the branch's own blocks. The hint is computed once, not step by step.
        """
        branch = self.fit(teacher)
        with torch.no_grad():
            hint = branch.embed_hint(filter_band(sources.to(teacher.device), self.band, seed))

        def steer(x: Tensor, timesteps: Tensor, context: Tensor, options: dict) -> list[Pair]:
            repeated = hint.repeat(len(x) // len(sources))
            own = {"sigmas": options.get("sigmas"), **(inner or {})}  # what a student's grids are moved by
            return [pair.scale(strength) for pair in branch(x, repeated, timesteps, context, own)]

        return control_options(steer)


def build_frozen(teacher: Teacher, config: ControlConfig) -> FCNet:
    """An untrained branch on the teacher's device."""
    return build_branch(teacher, config).to(teacher.device).eval().requires_grad_(False)


def read_branches(files: list[Path], teacher: Teacher) -> dict[str, FrozenBranch]:
    """Controls by band, in the order of the files; raises ControlFileError for a wrong one and two of one band."""
    branches: dict[str, FrozenBranch] = {}
    for file in files:
        branch = FrozenBranch(file.name, load_control(file), teacher)
        if branch.band in branches:
            raise ValueError(f"{branches[branch.band].name} and {file.name} are both of band {branch.band}; give one")
        branches[branch.band] = branch
    return branches


def join_options(*several: dict) -> dict[str, Any]:
    """`transformer_options` of several patches in one: the patches of a place one after the other."""
    joined: dict[str, Any] = {}
    for options in several:
        for name, value in options.items():
            known = joined.get(name)
            if isinstance(value, dict):
                joined[name] = join_options(known or {}, value)
            else:
                joined[name] = [*known, *value] if isinstance(value, list) and known else value
    return joined
