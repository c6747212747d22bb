"""Single self-attentions of the user's model on the user's device, as they are and with a short context, in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dha.planner import Planner
from ..dha.presets import NO_CAP, PRESETS, Stretch
from ..dha.sites import SITES, Architecture, Site
from ..dha.stopwatch import fill_lap, time_runs
from ..dha.student import FREE_CONFIG, START_CONFIG, Student
from .kernel import attend_short
from .no_room import spare_memory

LEVELS = (0, 1, 2)  # below these there is next to nothing to gain
FREE, TRAINED = (replace(config, levels=LEVELS) for config in (FREE_CONFIG, START_CONFIG))
HALF = Stretch(0.5, NO_CAP)  # as many keys as levels = auto may take at most, beside the presets'
ROUNDS = 5
LAP = {"cpu": 0.1}  # seconds: shorter runs are timed several at once
SHORTEST_LAP, MOST_RUNS = 0.03, 1000

Run = Callable[[], Tensor]


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


class Shortened(NamedTuple):
    """What students make of a layer with a share of its tokens as keys, so many."""

    share: float
    keys: int
    runs: list[Run]


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


def list_shortened(
    attention: nn.Module, students: Sequence[Student], layer: Layer, x: Tensor, emb: Tensor
) -> list[Shortened]:
    """What the students make of a layer in each stretch; those in which all tokens are keys are left out."""
    found = []
    for stretch in list_stretches():
        runs = []
        for student in students:
            prepared = Planner(student, stretch).prepare(layer.height, layer.width, x, None)
            if prepared is not None:
                plan, places = prepared
                site, heads = student.site(layer.site), attention.heads
                runs.append(partial(site, attention, attend_short, x, emb, plan, heads, places))
        if runs:
            found.append(Shortened(stretch.find_share(layer.tokens), plan.coarse + plan.chosen, runs))
    return found


def time_layer(
    attention: nn.Module, students: Sequence[Student], layer: Layer, x: Tensor, emb: Tensor, advance: Callable[[], Any]
) -> list[LayerTime]:
    """What each stretch makes of a layer's time; `advance` is called after the warm-up and after each of `ROUNDS`.

    What does not fit into the memory has no speed-up; without the layer as it is there is nothing to compare with, and
    the error is raised.
    """
    plain, shortened = partial(attention, x), list_shortened(attention, students, layer, x, emb)
    laps: dict[Run, int] = {plain: choose_runs(plain, x.device)}
    for run in (run for each in shortened for run in each.runs):
        with spare_memory():
            laps[run] = choose_runs(run, x.device)
    advance()
    seconds: dict[Run, list[float]] = {run: [] for run in laps}
    for _ in range(ROUNDS):
        for run, count in laps.items():
            seconds[run].append(time_runs(run, x.device, count))
        advance()
    found = []
    for share, keys, runs in shortened:
        fits = all(run in seconds for run in runs)
        speedup = min(relate(seconds[plain], seconds[run]) for run in runs) if fits else None
        found.append(LayerTime(share, keys, median(seconds[plain]), speedup))
    return found


def relate(plain: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster the other is: the median over rounds."""
    return median(a / b for a, b in zip(plain, other, strict=True))


def choose_runs(run: Run, device: torch.device) -> int:
    """How many runs make a lap; the first one, which sets libraries up, is not counted."""
    run()
    return fill_lap(time_runs(run, device, 1), LAP.get(device.type, SHORTEST_LAP), MOST_RUNS)
