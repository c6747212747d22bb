"""What one TOML file says about the training of a frequency control; sections that students have too are the same."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dha.frequency import BANDS

from ..fields import build, choice, merge, nest, real, whole
from ..settings import (
    DataSettings,
    OutputSettings,
    Settings,
    TeacherSettings,
    TrainSettings,
    WatchSettings,
    read_toml,
)


@dataclasses.dataclass(frozen=True)
class BranchSettings:
    """The branch: its band, the rank of its changes to the teacher's encoder (0 trains all weights), how it learns.

    `own_band` is the weight of the error in the band's own coefficients: a band that is few of them, as `mini` and
    `low` are, would hardly count in the error of all.
    """

    band: str = choice("low", *BANDS)
    rank: int = whole(8)
    own_band: float = real(1.0)
    steps: int = whole(4000)
    rate: float = real(2e-3, above=True)
    schedule: str = choice("cosine", "cosine", "constant")
    warmup: int = whole(50)


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """One run."""

    teacher: TeacherSettings = dataclasses.field(default_factory=TeacherSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    control: BranchSettings = dataclasses.field(default_factory=BranchSettings)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    output: OutputSettings = dataclasses.field(default_factory=OutputSettings)
    watch: WatchSettings = dataclasses.field(default_factory=WatchSettings)

    out, work, cache, teacher_file = Settings.out, Settings.work, Settings.cache, Settings.teacher_file
    to_toml = Settings.to_toml

    @property
    def steps(self) -> int:
        return self.control.steps

    def describe_run(self) -> dict[str, Any]:
        """What decides the branch's weights, without paths: it travels in states and in the control's file."""
        kept = {name: dataclasses.asdict(getattr(self, name)) for name in ("control", "train")}
        for name in ("device", "accumulation", "checkpointing", "budgets"):
            del kept["train"][name]
        framing = {name: getattr(self.data, name) for name in ("size", "max_ratio", "bucket_step", "min_side")}
        return {**kept, "data": framing}


def assemble_control(config: Path | None = None, overrides: Iterable[tuple[str, Any]] = ()) -> ControlSettings:
    """Defaults, then the file, then single overrides; raises SettingsError for a wrong one."""
    tables: Mapping[str, Any] = read_toml(config) if config else {}
    for name, value in overrides:
        tables = merge(tables, nest(name, value))
    return build(ControlSettings, tables)
