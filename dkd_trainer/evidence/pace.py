"""How many steps of each stage fit into a given time on this machine, for several rows side by side."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from ..engine.loop import Training
from ..engine.processes import Processes
from ..host import Teacher
from ..settings import Settings
from .ablation_rows import STAGES, TrainedRow

ROUNDS = 6  # one step of every stage of every row each; the first is not counted


def plan_steps(
    teacher: Teacher, corpus, rows: Mapping[str, tuple[TrainedRow, Settings]], seconds: float
) -> dict[str, dict[str, int]]:
    """Steps by row and stage whose time is the row's shares of `seconds`, at least one where there is a share.

    The paces are medians over rounds in which all rows take their turn: what else the machine does hits all alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        trials = {
            name: try_out(teacher, corpus, row, settings, Path(folder) / row.stem)
            for name, (row, settings) in rows.items()
        }
        laps: dict[tuple[str, str], list[float]] = {}
        for number in tqdm(range(ROUNDS), desc="measure the pace"):
            for name, training in trials.items():
                for stage in training.stages:
                    lap = time_step(training, stage.first + number)
                    laps.setdefault((name, stage.name), []).append(lap)
    paces = {key: median(values[1:]) for key, values in laps.items()}
    return {name: share_out(name, row, paces, seconds) for name, (row, _) in rows.items()}


def share_out(name: str, row: TrainedRow, paces: Mapping[tuple[str, str], float], seconds: float) -> dict[str, int]:
    """One row's steps by stage."""
    shares = zip(STAGES, row.shares, strict=True)
    return {stage: max(1, round(share * seconds / paces[name, stage])) if share else 0 for stage, share in shares}


def try_out(teacher: Teacher, corpus, row: TrainedRow, settings: Settings, folder: Path) -> Training:
    """A training of a row's stages, each long enough to be timed."""
    stages = zip(STAGES, row.shares, strict=True)
    parts = {name: replace(getattr(settings, name), steps=ROUNDS if share else 0) for name, share in stages}
    output = replace(settings.output, file=str(folder / "trial.safetensors"), work=str(folder))
    trial = replace(settings, output=output, **parts)
    return Training(teacher, corpus, trial, Processes(trial.train))


def time_step(training: Training, step: int) -> float:
    """Seconds of one step."""
    begun = time.perf_counter()
    training.take_step(step, training.read_step(step))
    return time.perf_counter() - begun
