"""What a training tells while it runs, read from the trainer's journal."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Progress:
    """A training so far. `losses` are (step, value) by stage and term, `errors` (step, error on held-out pairs).

    `validation` has the last of these errors in parts. `starts` are the first steps of the stages, `sheet` is the
    newest picture of samples, `seconds_left` the time to go.
    """

    step: int = 0
    total: int = 0
    stage: str = ""
    speed: float = 0.0
    seconds_left: float = 0.0
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    errors: list[tuple[int, float]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    starts: list[tuple[int, str]] = field(default_factory=list)
    sheet: Path | None = None

    def describe(self) -> str:
        """One line for the node."""
        if not self.stage:
            return f"step {self.step} of {self.total}"
        last = ", ".join(
            f"{name.split()[-1]} {points[-1][1]:.4f}"
            for name, points in self.losses.items()
            if name.startswith(f"{self.stage} ")
        )
        left = show_duration(self.seconds_left)
        return f"{self.stage} {self.step}/{self.total}, {last}, {self.speed:.1f} images/s, {left} left"


def read_progress(journal: Path) -> Progress | None:
    """The progress of a run, None before its first step was begun."""
    progress, started = Progress(), False
    for entry in read_entries(journal):
        started = True
        take_in(progress, entry, journal.parent)
    return progress if started else None


def read_entries(journal: Path) -> Iterator[dict[str, Any]]:
    """The journal's lines; one that is not whole yet is left out."""
    if not journal.is_file():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry:
            yield entry


def take_in(progress: Progress, entry: dict[str, Any], folder: Path) -> None:
    """Add what a line says."""
    event, step = entry["event"], entry.get("step", 0)
    progress.step = max(progress.step, step)
    if event == "start":
        progress.total, progress.step = entry["steps"], step
        progress.starts = [(stage["first"], stage["name"]) for stage in entry["stages"] if stage["steps"]]
    elif event == "step":
        progress.stage = entry["stage"]
        progress.speed, progress.seconds_left = entry["images_per_second"], entry["seconds_left"]
        for name, value in entry["losses"].items():
            progress.losses.setdefault(f"{entry['stage']} {name}", []).append((step, value))
    elif event == "validation":
        progress.validation = entry["errors"]
        progress.errors.append((step, sum_up(entry["errors"])))
    elif event == "sheet":
        progress.sheet = folder / entry["file"]


def sum_up(errors: dict[str, float]) -> float:
    """A validation as one number: a student's mean; the steered error over the unsteered one of a control."""
    return errors["mean"] if "mean" in errors else errors["steered"] / errors["unsteered"]


def read_failure(journal: Path, since: float) -> str:
    """The message of an error that the trainer noted after `since` (seconds since 1970), or nothing."""
    failures = [
        entry["message"] for entry in read_entries(journal) if entry["event"] == "error" and entry["time"] > since
    ]
    return failures[-1] if failures else ""


def show_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
