"""The rows of the ablation: stages, parts of a student, loss terms of stage 2, and contexts without training."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from dha.config import DHAConfig

from ..host import Teacher
from .attention_cost import count_cost, match_sparsity
from .contexts import builder_options, grid_and_chosen
from .peers import list_peers
from .subject import Subject

GROUPS = ("stages", "parts", "terms", "contexts")
STAGES = ("transfer", "imitation", "quality")
PUBLISHED_RATE, USUAL_RATE = 1e-6, 5e-4


@dataclass(frozen=True)
class TrainedRow:
    """A student to train: `overrides` of a preset's settings, and the share of the time that each stage gets."""

    name: str
    family: str
    preset: str
    shares: tuple[float, float, float]
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def stem(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


def list_stage_rows(student: DHAConfig, preset: str, side: int, channels: int) -> list[TrainedRow]:
    """One stage, two, three, and the published preset at the same cost on side x side tokens of the finest level.

    The published learning rate is for 150 000 steps; a second row has the usual one.
    """
    blank = DHAConfig(mode="official", levels=student.levels)
    official = match_sparsity(blank, count_cost(student, side, channels), side, channels)
    changes = (("student.levels", list(student.levels)), ("student.sparsity", official.sparsity))
    faster = tuple((f"{stage}.rate", USUAL_RATE) for stage in STAGES[1:])
    return [
        TrainedRow("stage 1", "stages", preset, (1.0, 0.0, 0.0)),
        TrainedRow("stages 1+2", "stages", preset, (0.6, 0.4, 0.0)),
        TrainedRow("stages 1+2+3", "stages", preset, (0.5, 0.3, 0.2)),
        TrainedRow(f"official, rate {PUBLISHED_RATE:g}", "official", "official", (0.0, 0.2, 0.8), changes),
        TrainedRow(f"official, rate {USUAL_RATE:g}", "official", "official", (0.0, 0.2, 0.8), (*changes, *faster)),
    ]


def list_part_rows(student: DHAConfig, preset: str) -> list[TrainedRow]:
    """The student of the preset with one part changed, through stages 1 and 2."""
    variants = {
        "all parts": student,
        "no memory": replace(student, memory=0),
        "no deltas": replace(student, rank=0),
        "router": replace(student, router_width=32),
        "no local branch": replace(student, local=0),
        "no landmarks": replace(student, landmarks=0),
        "grid tokens that blend with their cells' means": replace(student, blend=True),
        "twice the memory": replace(student, memory=2 * student.memory),
        "deltas alone": replace(student, memory=0, local=0),
        "deltas q, k, v": replace(student, deltas=("q", "k", "v")),
        "deltas k, v, out": replace(student, deltas=("k", "v", "out")),
        "twice the rank": replace(student, rank=2 * student.rank),
        "router, half of the keys on the grid": replace(student, router_width=32, coarse_share=0.5),
        "router, no grid": replace(student, router_width=32, coarse_share=0.0),
    }
    rows = []
    for name, config in variants.items():
        changed = {k: v for k, v in asdict(config).items() if v != getattr(student, k)}
        overrides = tuple((f"student.{k}", list(v) if isinstance(v, tuple) else v) for k, v in changed.items())
        rows.append(TrainedRow(name, "parts", preset, (0.6, 0.4, 0.0), overrides))
    return rows


def list_term_rows(preset: str) -> list[TrainedRow]:
    """The preset's student, half of the time in stage 1 and half in stage 2 with one term beside the prediction's.

    "One grid a step" counts an error that changes with the grid like one that stays.
    """
    terms: dict[str, dict[str, Any]] = {
        "prediction": {},
        "prediction, one grid a step": {"transfer.spread": 1.0, "imitation.spread": 1.0},
        "prediction and block outputs": {"imitation.blocks": 1.0},
        "prediction and attention outputs": {"imitation.attention": 1.0},
        "guided prediction": {"imitation.guidance": [1.0, 7.0]},
        "prediction and real noise": {"imitation.noise": [0.0, 1.0]},
    }
    return [TrainedRow(row, "terms", preset, (0.5, 0.5, 0.0), tuple(more.items())) for row, more in terms.items()]


def list_context_rows(levels: tuple[int, ...]) -> list[Subject]:
    """Keys chosen without any training: the peers, and grids with tokens chosen at random or by attention mass."""
    kinds = [(4, 0.0625, "random", False), (4, 0.0625, "mass", False), (4, 0.0625, "random", True)]
    kinds += [(4, 0.0625, "mass", True), (3, 0.125, "mass", True)]
    return [*list_peers(levels), *(chosen_row(levels, *kind) for kind in kinds)]


def chosen_row(levels: tuple[int, ...], stride: int, share: float, by: str, weighted: bool) -> Subject:
    """A strided grid and a share of all tokens beside it."""
    name = f"strided by {stride} + {share:.2%} {'by mass' if by == 'mass' else 'at random'}"
    builder = grid_and_chosen(stride, share, by, weighted)

    def build(teacher: Teacher, _side: int) -> dict:
        return builder_options(teacher, builder, levels)

    return Subject(f"{name}, {'' if weighted else 'un'}weighted", "contexts", build, name, identity=str(levels))
