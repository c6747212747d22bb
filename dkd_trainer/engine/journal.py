"""What a run tells while it runs: one JSON object per line, for programs that watch it, and TensorBoard's files."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch

from dha.whole_file import write_whole


class Journal:
    """`journal.jsonl` in the work folder. Every line has `event` and `time` (seconds since 1970), most have `step`.

    Events: `start`, `step`, `validation`, `sheet`, `save`, `stop`, `end`, `error`. A step counts the steps done.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, event: str, **values: Any) -> None:
        """Add a line; it is in the file when this returns."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def cut(self, step: int) -> None:
        """Drop what a run tells that goes on from `step`: later steps, its end, and a line that a kill cut off."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if is_before(line, step)]
        write_whole(self.path, "".join(f"{line}\n" for line in kept).encode())


def is_before(line: str, step: int) -> bool:
    """Whether a line is whole and still true for a run that goes on from `step`."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return entry["event"] not in ("end", "error", "stop") and step > 0 and entry.get("step", 0) <= step


class Board:
    """TensorBoard scalars and pictures in `folder`; does nothing when it is not wanted or not installed."""

    def __init__(self, folder: Path, wanted: bool, first: int):
        self.writer = None
        if wanted and importlib.util.find_spec("tensorboard") is None:
            print("tensorboard is not installed (pip install tensorboard); going on without it")
        elif wanted:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=first)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        """Scalars as `group/name`."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def show(self, name: str, picture: torch.Tensor, step: int) -> None:
        """A picture (3, H, W) in [0, 1]."""
        if self.writer is not None:
            self.writer.add_image(name, picture, step)
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
