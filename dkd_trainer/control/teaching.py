"""The controls that steer a teacher while a student of the pair is distilled: each step takes one, in its turn."""

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dha.control import Pair, apply_pairs
from dha.frequency import filter_band
from dha.sites import Site
from dha.student import Student

from ..data.batches import Batch
from ..engine.features import Features, keep_blocks, recompute_layers
from ..engine.imitation import mean_error, student_options
from ..engine.transfer import relative_error, watch_sites
from ..host import Teacher, hash_weights
from .steering import FrozenBranch, join_options, read_branches

Inputs = tuple[Tensor, ...]  # noisy latents (B, 4, h, w), timesteps (B,), contexts (B, 77, C)


class Controls:
    """Frozen controls by band. With `accelerate` the student runs in their branches as well.

    Raises ControlFileError for a file that does not fit the teacher, ValueError for two of one band.
    """

    def __init__(self, teacher: Teacher, files: Sequence[str], accelerate: bool = True):
        self.teacher, self.accelerate = teacher, accelerate
        self.branches = list(read_branches([Path(file) for file in files], teacher).values())
        for branch in self.branches:
            if branch.control.teacher not in ("unknown", teacher.fingerprint):
                print(f"{branch.name} was trained on another teacher than this one; going on with it")

    def choose(self, batch: Batch) -> FrozenBranch:
        """The control of a batch's step; all count the same."""
        return self.branches[batch.seed % len(self.branches)]

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a state must agree with, without paths; the files are hashed once, not at each save."""
        controls = [
            {"band": branch.band, "rank": branch.control.config.rank, "weights": hash_weights(branch.control.weights)}
            for branch in self.branches
        ]
        return json.loads(json.dumps({"branch": self.accelerate, "controls": controls}))

    def steer(
        self, batch: Batch, inputs: Inputs, runs: Sequence[dict], terms: Collection[str], checkpointing: bool
    ) -> tuple[dict, list[dict], dict[str, Tensor]]:
        """What `imitation_losses` asks for: the teacher's and the runs' options, and losses of the first run."""
        branch = self.choose(batch).branch
        shown, imitated = Features(), Features()
        kept = (shown, imitated) if "control_blocks" in terms else (None, None)
        with torch.no_grad(), keep_blocks(branch, kept[0]):
            taught = self.find_pairs(batch, inputs)
        found = [taught] * len(runs)
        if self.accelerate:
            with recompute_layers(branch, checkpointing):
                with keep_blocks(branch, kept[1]):
                    first = self.find_pairs(batch, inputs, runs[0])
                found = [first, *(self.find_pairs(batch, inputs, options) for options in runs[1:])]
        losses = {}
        if "control" in terms:
            losses["control"] = compare_pairs(found[0], taught)
        if "control_blocks" in terms:
            losses["control_blocks"] = mean_error(imitated.blocks, shown.blocks)
        steered = [apply_pairs(options, pairs) for options, pairs in zip(runs, found, strict=True)]
        return apply_pairs({}, taught), steered, losses

    def watch(self, student: Student, batch: Batch, spread: float = 1.0) -> tuple[dict, dict[str, Tensor]]:
        """Stage 1: the steered teacher's options, and what `transfer_losses` are in the branch's own layers."""
        branch, losses = self.choose(batch).branch, dict[str, Tensor]()

        def find_attention(site: Site) -> torch.nn.Module:
            return branch.get_submodule(site.name)

        how = (batch.budget, batch.seed, spread)
        watching = watch_sites(student, find_attention, losses, *how) if self.accelerate else {}
        with torch.no_grad():
            pairs = self.find_pairs(batch, (batch.noisy, batch.t, batch.context), {"patches": watching})
        return apply_pairs({}, pairs), {f"control/{name}": value for name, value in losses.items()}

    def find_pairs(self, batch: Batch, inputs: Inputs, options: dict | None = None) -> list[Pair]:
        """What the batch's control says about a forward, of as many halves of guidance as there are in `inputs`.

        `options` are the branch's own `transformer_options`.
        """
        chosen, (x, t, context) = self.choose(batch), inputs
        hint = chosen.branch.embed_hint(filter_band(batch.latents, chosen.band, seed=batch.seed))
        return chosen.branch(x, hint.repeat(len(x) // len(batch)), t.float(), context, dict(options or {}))

    def list_views(self, student: Student, sources: Tensor) -> list[tuple[dict, dict]]:
        """For each control `transformer_options` of the teacher and of the student, steered by `sources` (B, 4, h, w).

        They hold for all steps of a sampling.
        """
        options, views = student_options(student), []
        for branch in self.branches:
            own = branch.as_options(self.teacher, sources, inner=options if self.accelerate else None)
            views.append((branch.as_options(self.teacher, sources), join_options(options, own)))
        return views


def compare_pairs(found: Sequence[Pair], expected: Sequence[Pair]) -> Tensor:
    """Mean relative error of the 13 (add, mul) pairs: every tensor counts the same, whatever its norm."""
    both = zip(found, expected, strict=True)
    return torch.stack([relative_error(a, b) for pair, other in both for a, b in zip(pair, other, strict=True)]).mean()
