"""`--dry-run`: everything is built and each stage is tried, then what was learnt about the run is said."""

import contextlib
import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

from ..data.batches import Batch, Corpus, encode_pairs
from ..data.pairs import list_source
from ..data.source import DataError, Listing
from ..host import Teacher
from ..settings import Settings
from .loop import Training
from .processes import Processes
from .stages import Stage

TRIES, SECONDS = 4, 3.0  # of a stage at least; the first step warms up
LIMIT = 32  # pairs that are encoded


def rehearse(
    teacher: Teacher, settings: Settings, processes: Processes, kind: Callable[..., Training] = Training
) -> None:
    """Try `settings` in a folder that is deleted afterwards, and print shapes, sizes, speed and time to finish."""
    with tempfile.TemporaryDirectory() as folder:
        output = dataclasses.replace(settings.output, work=folder, file=str(Path(folder) / settings.out.name))
        data = dataclasses.replace(settings.data, cache="")
        trial = dataclasses.replace(settings, output=output, data=data)
        listing = list_source(data.path, data.limit or None)
        corpus, encoding = time_encoding(listing, teacher, trial, processes)
        training = kind(teacher, corpus, trial, processes)
        lines = describe_training(training)
        left = encoding * len(listing.pairs)
        lines.append(f"encoding, once: {len(listing.pairs)} pairs, {left / 60:.1f} minutes at {encoding:.2g} s each")
        if teacher.device.type == "cuda":  # pairs were encoded: that is not the training's
            torch.cuda.reset_peak_memory_stats(teacher.device)
        for stage in training.stages:
            pace = try_stage(training, stage)
            left += pace.seconds * stage.settings.steps
            terms = ", ".join(f"{name} {value:.4f}" for name, value in training.losses.items())
            lines.append(f"{stage.name}: {stage.settings.steps} steps, {pace.describe(settings, encoding)}; {terms}")
        counted = "in steps" if teacher.device.type == "cuda" else "of the process, loading and encoding included"
        lines.append(f"peak memory: {measure_memory(teacher.device):.2f} GB {counted}; sheets not counted")
        lines.append(f"time to finish: {left / 60:.1f} minutes")
    if processes.is_first:
        print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of a step as in a run, and how many of them go by outside of the models: batches and states.

    `forward` are those of the teacher alone on the same batch.
    """

    seconds: float
    outside: float
    forward: float

    def describe(self, settings: Settings, encoding: float) -> str:
        """What a user may expect, with the seconds that encoding a pair anew takes."""
        batch = settings.train.batch
        speeds = [batch / seconds for seconds in (self.seconds, self.seconds + batch * encoding, self.forward)]
        return (
            f"{speeds[0]:.2f} images/s ({speeds[1]:.2f} without the cache), {self.seconds / self.forward:.2f} times "
            f"the teacher alone ({speeds[2]:.2f} images/s), {self.outside / self.seconds:.1%} outside of the models"
        )


def time_encoding(listing: Listing, teacher: Teacher, trial: Settings, processes: Processes) -> tuple[Corpus, float]:
    """Some of the pairs, and the seconds that each takes to be encoded: what opening them is faster with a cache.

    The first pair warms up and is not counted.
    """
    first, some = (Listing(listing.source, listing.wanted, listing.pairs[:count]) for count in (1, LIMIT))
    times = []
    with contextlib.suppress(DataError):  # it may be a broken one
        encode_pairs(first, teacher, trial, True)
    for _ in range(2):
        begun = time.perf_counter()
        corpus = encode_pairs(some, teacher, trial, not processes.is_first)
        times.append(time.perf_counter() - begun)
    return corpus, max(0.0, times[0] - times[1]) / max(1, len(corpus) - 1)


def describe_training(training: Training) -> list[str]:
    """Lines about data, shapes and trainable parts."""
    corpus, teacher = training.corpus, training.teacher
    count = sum(parameter.numel() for parameter in training.parameters)
    lines = [f"{len(corpus)} pairs tried, {teacher.architecture.label}, {teacher.prediction} prediction"]
    for (height, width), members in training.sampler.buckets.items():
        shape = (training.settings.train.batch, 4, height, width)
        budgets = ", ".join(f"{budget:g}" for budget in training.sampler.budgets[height, width])
        lines.append(f"latents {shape}: {len(members)} pairs; key budgets {budgets}")
        for level in sorted(training.settings.student.levels):
            plan = training.student.plan(-(-height >> level), -(-width >> level))
            lines.append(f"  level {level}: {plan.tokens} tokens, {plan.coarse} grid and {plan.chosen} chosen keys")
    sites = len(training.student.list_sites())
    lines.append(f"{count} trainable parameters in {sites} layers; {training.processes.count} process(es)")
    return lines


def try_stage(training: Training, stage: Stage) -> Pace:
    """A stage's pace once it is warm, with the next batch read during a step and a state saved now and then."""
    step, times, waits, forwards = stage.first, [], [], []
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(training.read_step, step)
        while training.processes.hand_out(len(times) < TRIES or sum(times) < SECONDS):
            begun = time.perf_counter()
            parts = coming.result()
            waits.append(time.perf_counter() - begun)
            forwards.append(time_teacher(training, parts))  # in turns: other programs slow both down
            begun = time.perf_counter()
            after = min(step + 1, stage.end - 1)
            coming = reader.submit(training.read_step, after)
            training.take_step(step, parts)
            times.append(waits[-1] + time.perf_counter() - begun)
            step = after
    begun = time.perf_counter()
    training.save(stage.end)
    saving = (time.perf_counter() - begun) / training.settings.output.save_every
    return Pace(median(times[1:]) + saving, median(waits[1:]) + saving, median(forwards[1:]))


@torch.no_grad()
def time_teacher(training: Training, parts: list[Batch]) -> float:
    """Seconds of the teacher's forward alone."""
    begun = time.perf_counter()
    with training.lower_precision():
        for part in parts:
            training.teacher.predict(part.noisy, part.t, part.context).sum().item()
    return time.perf_counter() - begun


def measure_memory(device: torch.device) -> float:
    """The most memory in use so far in GB: the GPU's where there is one, the process's otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    resource = importlib.import_module("resource")  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
