"""Seconds of one UNet step of every subject: all in one process, in turn, round by round."""

from collections.abc import Sequence
from functools import partial
from statistics import median, quantiles

import torch
from tqdm import tqdm

from dha.presets import mix_steps
from dha.stopwatch import time_runs

from ..host import Teacher
from .pair_counter import PairCounter
from .subject import Running, Subject

LAP = 0.2  # seconds: shorter steps are timed several at once
MOST_STEPS = 50


@torch.inference_mode()
def time_subjects(
    teacher: Teacher,
    subjects: Sequence[Subject],
    size: int,
    batch: int,
    rounds: int,
    sampling: int | None = None,
    precision: str = "fp32",
) -> dict[str, dict]:
    """Per subject: `seconds` a step with quartiles, `relative` to the first subject, and its `attention_pairs`.

    Where a subject changes within a sampling they are means over all of its steps, and where it takes fewer
    steps than the others' `sampling` of them its time is spread over as many. Medians over rounds, after an uncounted
    step each; `relative` is that of laps of the same round, pairs of query and key are a share of the first subject's
    in all attentions. `size` in pixels, `batch` rows of a UNet call.
    """
    side = size // 8
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, side, side, generator=generator).to(teacher.device)
    context = torch.randn(batch, 77, teacher.architecture.context, generator=generator).to(teacher.device)
    t = torch.full((batch,), 999, device=teacher.device)  # before any end
    runs = {subject.name: list_parts(Running(teacher, subject, side, precision)) for subject in subjects}

    def count(running: Running) -> int:
        with PairCounter() as counter:
            running.predict(latents, t, context)
        return counter.pairs

    def lap(running: Running, steps: int) -> float:
        return time_runs(partial(running.predict, latents, t, context), teacher.device, steps)

    pairs = {name: [count(part) for part in parts] for name, parts in runs.items()}
    (first,) = runs[subjects[0].name]
    steps = min(MOST_STEPS, max(1, round(LAP / lap(first, 1))))
    laps: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=f"time at {size}", leave=False):
        for name, parts in runs.items():
            laps[name].append([lap(part, steps) for part in parts])
    base, (whole,) = [own for (own,) in laps[subjects[0].name]], pairs[subjects[0].name]
    found = {}
    for name, parts in runs.items():
        ends, fewer = [part.subject.end for part in parts], parts[0].subject.steps
        share = fewer / sampling if fewer and sampling else 1.0
        mean = [share * mix_steps(ends, [*own, exact]) for own, exact in zip(laps[name], base, strict=True)]
        attended = share * mix_steps(ends, [*(count / whole for count in pairs[name]), 1.0])
        found[name] = describe(mean, base, attended)
    return found


def list_parts(running: Running) -> list[Running]:
    """What runs one after the other in a sampling."""
    return [running] if running.then is None else [running, *list_parts(running.then)]


def describe(laps: list[float], base: list[float], pairs: float) -> dict[str, float]:
    """Medians and quartiles of one subject's laps beside those of the unpatched teacher."""
    low, _, high = quantiles(laps, n=4, method="inclusive") if len(laps) > 1 else laps * 3
    ratio = median(own / first for own, first in zip(laps, base, strict=True))
    return {"seconds": median(laps), "q1": low, "q3": high, "relative": ratio, "attention_pairs": pairs}
