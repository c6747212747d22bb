"""The stages of a run: which losses, with which weights and learning rate, at which step."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dha.config import NORM_GROUPS
from dha.student import Student

from ..data.batches import Batch
from ..fields import SettingsError
from ..host import Teacher
from ..settings import ImitationSettings, Settings, TransferSettings
from .imitation import imitation_losses
from .schedule import cosine_rate
from .transfer import transfer_losses

TERMS = ("output", "noise", "blocks", "attention", "maps", "routing", "control", "control_blocks")
MEMORY = 0.98  # how slowly the measured size of a loss term follows its values


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `end` of a run under one set of losses."""

    name: str
    first: int
    settings: TransferSettings | ImitationSettings

    @property
    def end(self) -> int:
        return self.first + self.settings.steps

    @property
    def guidance(self) -> tuple[float, ...]:
        return getattr(self.settings, "guidance", ())

    @property
    def balance(self) -> bool:
        return getattr(self.settings, "balance", False)

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up, then constant or half a cosine, started anew at each stage."""
        settings, inside = self.settings, step - self.first
        warmup = min(settings.warmup, settings.steps)
        if settings.schedule == "constant":
            return settings.rate * min(1.0, (inside + 1) / max(1, warmup))
        return settings.rate * cosine_rate(inside, settings.steps, warmup)

    def weights(self, step: int) -> dict[str, float]:
        """Weights of the loss terms at a step, without those that never count in this stage."""
        if isinstance(self.settings, TransferSettings):
            return {"attention": 1.0, "routing": self.settings.routing}
        weights = {name: getattr(self.settings, name) for name in TERMS if name != "noise"}
        start, end = self.settings.noise
        weights["noise"] = start + (end - start) * (step - self.first) / max(1, self.settings.steps - 1)
        never = {name for name, weight in weights.items() if not weight} - ({"noise"} if start or end else set())
        return {name: weights[name] for name in TERMS if name not in never}

    def measure(self, teacher: Teacher, student: Student, batch: Batch, checkpointing: bool) -> dict[str, Tensor]:
        """The stage's loss terms on a part of a batch, each a mean over its samples."""
        if not isinstance(self.settings, TransferSettings):
            terms = self.weights(self.first)
            guided, spread = bool(self.guidance), self.settings.spread
            return imitation_losses(teacher, student, batch, terms, guided, checkpointing, spread=spread)
        inputs = (batch.noisy, batch.t, batch.context, batch.budget, batch.seed)
        return average_sites(transfer_losses(teacher, student, *inputs, spread=self.settings.spread))


def average_sites(by_site: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `transfer_losses` found, as loss terms: the means over the sites."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in by_site.items():
        groups.setdefault("routing" if name.endswith("/routing") else "attention", []).append(value)
    return {term: sum(values) / len(values) for term, values in groups.items()}


def list_stages(settings: Settings) -> list[Stage]:
    """The stages that have steps, in order; raises SettingsError for one without losses, or with another mode's.

    A student of other norms than its teacher's is refused as well: while it learns, both run through the same ones.
    """
    if settings.student.norm_groups != NORM_GROUPS:
        raise SettingsError(
            f"setting 'student.norm_groups' is {settings.student.norm_groups}, expected {NORM_GROUPS}, as the teacher "
            "has: students of other norms can be imported and run, not trained"
        )
    stages: list[Stage] = []
    for name in ("transfer", "imitation", "quality"):
        part = getattr(settings, name)
        if part.steps:
            stages.append(Stage(name, stages[-1].end if stages else 0, part))
    for stage in stages:
        terms = stage.weights(stage.first)
        if not terms:
            raise SettingsError(
                f"all loss weights of [{stage.name}] are 0, expected one above; give {stage.name}.output"
            )
        for name in ("maps", "routing"):
            if name in terms and stage.name != "transfer" and settings.student.mode != "official":
                raise SettingsError(
                    f"setting '{stage.name}.{name}' belongs to students of mode 'official'; set it to 0"
                )
        if {"control", "control_blocks"} & terms.keys() and not (settings.pair.controls and settings.pair.branch):
            raise SettingsError(
                f"settings '{stage.name}.control' and '.control_blocks' belong to students that control branches run "
                "with; set them to 0, or give --control and pair.branch=true"
            )
    return stages


def find_stage(stages: list[Stage], step: int) -> Stage:
    return next(stage for stage in stages if step < stage.end)


class Balance:
    """Scales loss terms to the size of the first one, measured as it goes; a term joins when its size is known.

    `sizes`, by stage and term, is what a state has to keep.
    """

    def __init__(self, sizes: Mapping[str, float] | None = None):
        self.sizes = dict(sizes or {})

    def weigh(self, stage: Stage, step: int) -> dict[str, float]:
        """Factors of the loss terms at a step."""
        weights = stage.weights(step)
        if not stage.balance:
            return weights
        main = next(iter(weights))
        sizes = {term: self.sizes.get(f"{stage.name}/{term}", 0.0) for term in weights}
        scales = {term: sizes[main] / size if size else 0.0 for term, size in sizes.items()}
        return {term: weight * (1.0 if term == main else scales[term]) for term, weight in weights.items()}

    def follow(self, stage: Stage, values: Mapping[str, float]) -> None:
        """Take in the terms of a step."""
        for term, value in values.items():
            name = f"{stage.name}/{term}"
            self.sizes[name] = MEMORY * self.sizes.get(name, value) + (1 - MEMORY) * value
