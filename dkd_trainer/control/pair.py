"""The distillation of a steered teacher: the students' engine, with a control on both sides of every loss."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from dha.student import Student

from ..data.batches import Batch, Corpus
from ..engine.imitation import imitation_losses
from ..engine.loop import Training
from ..engine.processes import Processes
from ..engine.sheets import Examination
from ..engine.stages import Stage, average_sites
from ..engine.transfer import transfer_losses
from ..host import Teacher
from ..settings import Settings, TransferSettings, WatchSettings
from .teaching import Controls


@dataclass(frozen=True)
class PairStage(Stage):
    """A stage whose teacher and student are steered by the same control."""

    controls: Controls = field(kw_only=True)

    def measure(self, teacher: Teacher, student: Student, batch: Batch, checkpointing: bool) -> dict[str, Tensor]:
        """The stage's loss terms, of the UNet's layers and the branch's; the band is that of the batch's pictures."""
        if isinstance(self.settings, TransferSettings):
            options, losses = self.controls.watch(student, batch, self.settings.spread)
            inputs = (batch.noisy, batch.t, batch.context, batch.budget, batch.seed)
            found = transfer_losses(teacher, student, *inputs, options, self.settings.spread)
            return average_sites({**found, **losses})
        terms, spread = self.weights(self.first), self.settings.spread
        steer = partial(self.controls.steer, batch, terms=terms, checkpointing=checkpointing)
        return imitation_losses(teacher, student, batch, terms, bool(self.guidance), checkpointing, steer, spread)


class PairTraining(Training):
    """A student of a teacher that each step's control steers."""

    def __init__(
        self,
        teacher: Teacher,
        corpus: Corpus,
        settings: Settings,
        processes: Processes,
        held_out: Corpus | None = None,
    ):
        self.controls = Controls(teacher, settings.pair.controls, settings.pair.branch)
        super().__init__(teacher, corpus, settings, processes, held_out)

    def list_stages(self) -> list[Stage]:
        return [PairStage(s.name, s.first, s.settings, controls=self.controls) for s in super().list_stages()]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pair": self.controls.description}

    def make_examination(self, corpus: Corpus, picks: list[int]) -> Examination:
        watch, batch = self.settings.watch, self.processes.size
        return PairExamination(self.teacher, corpus, picks, watch, batch, self.controls)


class PairExamination(Examination):
    """Fixed pairs with fixed noise, steered by their own bands: a comparison for each of the controls."""

    def __init__(
        self,
        teacher: Teacher,
        corpus: Corpus,
        picks: list[int],
        watch: WatchSettings,
        batch: int,
        controls: Controls,
    ):
        super().__init__(teacher, corpus, picks, watch, batch)
        self.controls = controls

    def list_views(self, student: Student, part: slice) -> list[tuple[dict, dict]]:
        return self.controls.list_views(student, self.latents[part])
