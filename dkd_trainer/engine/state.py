"""What a run leaves to go on from: its last states in a folder, and the wish to stop."""

import pickle
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..fields import merge
from .schedule import load_state, save_state


class TrainingStopped(Exception):
    """A signal asked the run to stop; its state was saved. `signal_number` says which one."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}, the state is saved; the same command goes on from there")
        self.step, self.signal_number = step, signal_number


class StateFolder:
    """States of one run as `state-STEP.pt`; the last `keep` of them stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def list_files(self) -> list[Path]:
        """Whole states, the oldest first."""
        return sorted(self.folder.glob("state-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a state, then delete those that are too many. Raises OSError with the old ones kept."""
        path = self.folder / f"state-{step:08d}.pt"
        save_state(path, {**state, "step": step})
        for old in self.list_files()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self, run: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The newest state that can be read, None before the first; raises ValueError for one of another `run`.

        `defaults` stand for settings that did not exist yet when it was saved. What a kill left half written goes.
        """
        for partial in self.folder.glob("state-*.partial"):
            partial.unlink()
        for path in reversed(self.list_files()):
            try:
                state = load_state(path)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                print(f"{path.name} is damaged ({type(error).__name__}), going on from the state before")
                continue
            if differences := list_differences(merge(defaults or {}, state["run"]), run):
                raise ValueError(
                    f"{path} belongs to a run with other settings ({'; '.join(differences[:3])}); go back to those, "
                    "give another --work folder or delete it"
                )
            return state
        return None


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested tables, as `name was x, is y`."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += list_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return found


class StopRequest:
    """Notes SIGINT and SIGTERM while it lasts, so that a step is never left half done; a second SIGINT ends at once.

    A second SIGTERM says nothing new: schedulers signal every process, and torchrun passes on what it got itself.
    """

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *_error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def to_cpu(value: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: to_cpu(part) for name, part in value.items()}
    return [to_cpu(part) for part in value] if isinstance(value, (list, tuple)) else value
