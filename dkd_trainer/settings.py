"""Everything that one TOML file says about a run, with the defaults, the presets and the order in which they count."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dha.config import DHAConfig, drop_retired
from dha.student import START_CONFIG

from .fields import SettingsError, build, choice, merge, nest, real, reals, switch, text, texts, to_toml, whole
from .host import SHIPPED_TEACHER

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """Which checkpoint teaches: an SD-2.x file; empty means the mini SD-2.1 that comes with the pack."""

    file: str = text()


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """The student of a steered teacher: files of the frequency controls, of which each step takes one, in turn.

    With `branch` the control's own branch runs with the student's encoder layers as well.
    """

    controls: tuple[str, ...] = texts()
    branch: bool = switch(True)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the pairs are, as `corpus.open_corpus` takes them, and how they are cut.

    `size` is the side of the pictures in pixels. With `max_ratio` above 1 other shapes of that area count too, their
    sides multiples of `bucket_step`. `min_side` 0 means half of `size`. `limit` takes the first pairs alone, 0 takes
    all: each is encoded before the first step. `held_out` is a source for validation alone,
    `cache` (in the work folder if empty) keeps what was encoded. `draw_*` is for prompts without pictures.
    """

    path: str = text()
    size: int = whole(512, 64)
    max_ratio: float = real(1.0, 1.0, 8.0)
    bucket_step: int = whole(64, 8)
    min_side: int = whole(0)
    limit: int = whole(0)
    held_out: str = text()
    cache: str = text()
    draw_steps: int = whole(25, 1)
    draw_guidance: float = real(7.5)
    draw_seed: int = whole(0)


@dataclasses.dataclass(frozen=True)
class TransferSettings:
    """Stage 1: each replaced layer learns its teacher's output from its teacher's input.

    `spread` is what an error counts that changes with the layer's grid, beside one that stays: over a sampling, whose
    grids change, most of it cancels. Below 1 each step looks at two grids.
    """

    steps: int = whole(1500)
    rate: float = real(2e-3, above=True)
    schedule: str = choice("cosine", "cosine", "constant")
    warmup: int = whole(50)
    routing: float = real(0.1)
    spread: float = real(0.1, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class ImitationSettings:
    """Stages 2 and 3: the student runs on its own; the numbers are weights of its loss terms, 0 leaves one out.

    `output` pulls to the teacher's prediction, `blocks` to its block outputs, `attention` to its self-attention
    outputs, `noise` (at the stage's start and end) to what was really added; `maps` and `routing` belong to mode
    `official`, `control` and `control_blocks` to pairs: the (add, mul) pairs that the control branch gives, and its
    block outputs. `spread` is for `output` what it is in stage 1. With `balance` every term is first scaled to the size
    of the prediction's. `guidance` is the range of scales that the compared predictions are mixed with, empty for none.
    """

    steps: int = whole(500)
    rate: float = real(5e-4, above=True)
    schedule: str = choice("cosine", "cosine", "constant")
    warmup: int = whole(50)
    output: float = real(1.0)
    blocks: float = real(0.0)
    attention: float = real(0.0)
    noise: tuple[float, ...] = reals((0.0, 0.0), (2,), what="two weights, at the start and the end of the stage")
    maps: float = real(0.0)
    routing: float = real(0.0)
    control: float = real(0.0)
    control_blocks: float = real(0.0)
    balance: bool = switch(True)
    spread: float = real(0.1, 0.0, 1.0)
    guidance: tuple[float, ...] = reals((), (0, 2), what="nothing, or the least and the greatest guidance scale")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a step is made. `batch` counts the samples of a step over all processes and `accumulation` parts.

    `timestep_shift` above 1 draws more of the noisy timesteps, below 1 more of the clean ones.
    """

    batch: int = whole(16, 1)
    accumulation: int = whole(1, 1)
    seed: int = whole(0)
    device: str = choice("auto", "auto", "cpu", "cuda")
    precision: str = choice("fp32", "fp32", "bf16")
    checkpointing: bool = switch(False)
    clip: float = real(1.0)
    ema: float = real(0.99, 0.0, 0.99999)
    budgets: tuple[float, ...] = reals((0.5, 1.0, 1.0, 2.0), (), 0.01, "factors of student.token_budget")
    empty_prompts: float = real(0.2, 0.0, 1.0)
    timestep_shift: float = real(1.0, above=True)


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """Where the student goes; `work` (beside it if empty) keeps states and caches, the last `keep` states."""

    file: str = text()
    work: str = text()
    save_every: int = whole(100, 1)
    keep: int = whole(2, 1)


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """What is shown while it runs; intervals in steps, 0 for never."""

    log_every: int = whole(10, 1)
    validate_every: int = whole(500)
    sheet_every: int = whole(500)
    pairs: int = whole(16, 1)
    pictures: int = whole(4, 1)
    guidance: float = real(4.0)
    tensorboard: bool = switch(False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run; `start` is a student file whose weights it begins with, empty for fresh ones."""

    preset: str = text()
    start: str = text()
    teacher: TeacherSettings = dataclasses.field(default_factory=TeacherSettings)
    pair: PairSettings = dataclasses.field(default_factory=PairSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    student: DHAConfig = START_CONFIG
    transfer: TransferSettings = dataclasses.field(default_factory=TransferSettings)
    imitation: ImitationSettings = dataclasses.field(default_factory=ImitationSettings)
    quality: ImitationSettings = dataclasses.field(
        default_factory=lambda: ImitationSettings(steps=0, rate=1e-4, noise=(0.0, 1.0))
    )
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    output: OutputSettings = dataclasses.field(default_factory=OutputSettings)
    watch: WatchSettings = dataclasses.field(default_factory=WatchSettings)

    @property
    def steps(self) -> int:
        return self.transfer.steps + self.imitation.steps + self.quality.steps

    @property
    def out(self) -> Path:
        return Path(self.output.file)

    @property
    def work(self) -> Path:
        return Path(self.output.work) if self.output.work else self.out.parent / f"{self.out.stem}.work"

    @property
    def cache(self) -> Path:
        return Path(self.data.cache) if self.data.cache else self.work / "cache"

    @property
    def teacher_file(self) -> Path:
        return Path(self.teacher.file) if self.teacher.file else SHIPPED_TEACHER

    def to_toml(self) -> str:
        """All settings, as a file that `--config` reads back."""
        return to_toml(dataclasses.asdict(self))

    def describe_run(self) -> dict[str, Any]:
        """What decides the student's weights, without paths: it travels in states and in the student's file."""
        values = dataclasses.asdict(self)
        kept = {name: values[name] for name in ("student", "transfer", "imitation", "quality", "train")}
        for name in ("device", "accumulation", "checkpointing"):
            del kept["train"][name]
        framing = {name: values["data"][name] for name in ("size", "max_ratio", "bucket_step", "min_side")}
        return {**kept, "data": framing}


def default_tables() -> dict[str, Any]:
    """The defaults as tables, so that a file that changes one number of a section keeps the others."""
    return dataclasses.asdict(Settings())


def list_presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as tables; raises SettingsError when it is missing or none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as a TOML file: {error}") from error


def read_preset(name: str, steered: bool = False) -> dict[str, Any]:
    """A shipped preset's tables; with `steered` together with what it says of pairs alone."""
    if name not in list_presets():
        raise SettingsError(f"setting 'preset' is {name!r}, expected one of {', '.join(list_presets())}")
    tables = read_toml(PRESETS / f"{name}.toml")
    further = tables.pop("steered", {})
    return merge(tables, further) if steered else tables


def is_steered(tables: Mapping[str, Any]) -> bool:
    """Whether controls are given whose branches run with the student."""
    pair = tables.get("pair", {})
    return isinstance(pair, Mapping) and bool(pair.get("controls")) and pair.get("branch", True) is True


def parse_override(argument: str) -> tuple[str, Any]:
    """`a.b=c` as name and value; the value is read as TOML, and as a text where it is none."""
    name, equals, value = argument.partition("=")
    if not equals or not name.strip():
        raise SettingsError(f"--set {argument!r} is not of the form section.name=value, as in train.batch=8")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def assemble_settings(
    preset: str = "", config: Path | None = None, overrides: Iterable[tuple[str, Any]] = ()
) -> Settings:
    """Defaults, then the preset, then the file, then single overrides; raises SettingsError for a wrong one.

    A file may name its preset itself.
    """
    tables: Mapping[str, Any] = read_toml(config) if config else {}
    preset = preset or tables.get("preset", "")
    if not isinstance(preset, str):
        raise SettingsError(f"setting 'preset' is {preset!r}, expected one of {', '.join(list_presets())}")
    over: dict[str, Any] = {}
    for name, value in overrides:
        over = merge(over, nest(name, value))
    given = merge(tables, over)
    if isinstance(given.get("student"), Mapping):
        given = {**given, "student": drop_retired(dict(given["student"]))}
    base = merge(default_tables(), read_preset(preset, is_steered(given)) if preset else {})
    return build(Settings, {**merge(base, given), "preset": preset})


def share_steps(settings: Settings, total: int) -> Settings:
    """The same run with `total` steps, shared by its stages in the same proportions; raises SettingsError."""
    if total < 1 or not settings.steps:
        raise SettingsError(f"--steps is {total} for stages of {settings.steps} steps, expected both to be at least 1")
    given, done, shared = 0, 0, {}
    for name in ("transfer", "imitation", "quality"):
        stage = getattr(settings, name)
        done += stage.steps
        end = round(total * done / settings.steps)
        shared[name] = dataclasses.replace(stage, steps=end - given)
        given = end
    return dataclasses.replace(settings, **shared)
