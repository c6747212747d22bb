"""Single self-attentions of the user's model on the user's device, as they are and with a short context, in turn."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dha.config import DHAConfig
from ..dha.planner import Planner
from ..dha.presets import NO_CAP, PRESETS, Stretch
from ..dha.sites import SITES, Architecture, Site
from ..dha.student import FREE_CONFIG, Student
from .apply import attend
from .timing import synchronise

LEVELS = (0, 1, 2)  # below these there is next to nothing to gain
TRAINED = DHAConfig(levels=LEVELS, landmarks=FREE_CONFIG.landmarks, memory=32, rank=8, local=16)
FREE = DHAConfig(levels=LEVELS, landmarks=FREE_CONFIG.landmarks)
HALF = Stretch(0.5, NO_CAP)  # as many keys as levels = auto may take at most, beside the presets'
ROUNDS = 5
LAP = {"cpu": 0.1}  # seconds: shorter runs are timed several at once
SHORTEST_LAP, MOST_RUNS = 0.03, 1000

Runs = dict[str, Callable[[], Tensor]]  # what is timed, by name


@dataclass(frozen=True)
class Layer:
    """The first self-attention of a level, at a picture's size: height x width tokens."""

    site: Site
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer as it is, and how many times faster it was with a share of its tokens as keys, so many.

    The slower counts of training-free and trained parts; `speedup` None says that it did not fit into the memory.
    """

    share: float
    keys: int
    seconds: float
    speedup: float | None


def find_layers(width: int, height: int) -> list[Layer]:
    """A layer of each of `LEVELS` for a picture of width x height pixels."""
    firsts = [next(site for site in SITES if site.level == level) for level in LEVELS]
    return [Layer(site, -(-height // (8 << site.level)), -(-width // (8 << site.level))) for site in firsts]


def list_stretches() -> list[Stretch]:
    """How keys are spent: as in the presets, each number of keys once, and then half of the tokens."""
    found = [stretch for preset in PRESETS.values() for stretch in preset.stretches]
    alike = {(stretch.token_budget, stretch.max_tokens): stretch for stretch in [*found, HALF]}
    return list(alike.values())


def draw_tokens(layer: Layer, batch: int, architecture: Architecture) -> tuple[Tensor, Tensor]:
    """Normed tokens (B, N, C) and a time embedding (B, E); what they say does not change the time."""
    channels = architecture.channels[layer.site.name]
    x = F.layer_norm(torch.randn(batch, layer.tokens, channels), (channels,))
    return x, torch.randn(batch, architecture.embedding)


def make_students(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> list[Student]:
    """One without trained parts and one with fresh ones."""
    return [Student(config, architecture).start().to(device, dtype).requires_grad_(False) for config in (FREE, TRAINED)]


def list_runs(
    attention: nn.Module, students: Sequence[Student], layer: Layer, x: Tensor, emb: Tensor
) -> tuple[Runs, dict[Stretch, int]]:
    """The layer as it is, then what a student makes of it in each stretch, by name; and the stretches' keys.

    Stretches in which all tokens are keys are left out.
    """
    runs: Runs = {"plain": partial(attention, x)}
    keys = {}
    for stretch in list_stretches():
        for number, student in enumerate(students):
            prepared = Planner(student, stretch).prepare(layer.height, layer.width, x, None)
            if prepared is None:
                continue
            plan, places = prepared
            keys[stretch] = plan.coarse + plan.chosen
            site = student.site(layer.site)
            name = name_run(stretch, number)
            runs[name] = partial(site, attention, attend, x, emb, plan, attention.heads, places)
    return runs, keys


def name_run(stretch: Stretch, number: int) -> str:
    return f"{stretch.token_budget}/{stretch.max_tokens}/{number}"


def time_layer(
    attention: nn.Module,
    students: Sequence[Student],
    layer: Layer,
    x: Tensor,
    emb: Tensor,
    advance: Callable[[], Any],
    is_memory: Callable[[RuntimeError], bool],
) -> list[LayerTime]:
    """What each stretch makes of a layer's time; `advance` is called after each of `ROUNDS` rounds and the warm-up.

    What does not fit into the memory, as `is_memory` says of an error, has no speed-up; without the layer as it is
    there is nothing to compare with, and the error is raised.
    """
    runs, keys = list_runs(attention, students, layer, x, emb)
    laps = {}
    for name, run in runs.items():
        try:
            laps[name] = choose_runs(run, x.device)
        except RuntimeError as error:
            if name == "plain" or not is_memory(error):
                raise
            comfy.model_management.soft_empty_cache()
    advance()
    seconds: dict[str, list[float]] = {name: [] for name in laps}
    for _ in range(ROUNDS):
        for name, count in laps.items():
            seconds[name].append(time_runs(runs[name], x.device, count))
        advance()
    found = []
    for stretch, count in keys.items():
        names = [name_run(stretch, number) for number in range(len(students))]
        speedups = [relate(seconds["plain"], seconds[name]) for name in names if name in seconds]
        speedup = min(speedups) if len(speedups) == len(names) else None
        share = min(stretch.token_budget, stretch.max_tokens / layer.tokens)
        found.append(LayerTime(share, count, median(seconds["plain"]), speedup))
    return found


def relate(plain: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster the other is: the median over rounds."""
    return median(a / b for a, b in zip(plain, other, strict=True))


def choose_runs(run: Callable[[], Tensor], device: torch.device) -> int:
    """How many runs make a lap; the first one, which sets libraries up, is not counted."""
    run()
    seconds = time_runs(run, device, 1)
    return max(1, min(MOST_RUNS, math.ceil(LAP.get(device.type, SHORTEST_LAP) / max(seconds, 1e-9))))


def time_runs(run: Callable[[], Tensor], device: torch.device, count: int) -> float:
    """Seconds a run, mean of `count` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / count
