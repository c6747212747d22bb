"""One run at a time in a work folder."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dha.whole_file import write_whole

from ..data.cache import hold
from .journal import Journal
from .processes import Processes
from .state import TrainingStopped

LOCK, HOLDER = "run.lock", "run.json"


class FolderOccupied(ValueError):
    """Another run works in the folder."""


@contextlib.contextmanager
def occupy(folder: Path, processes: Processes) -> Iterator[None]:
    """Keep a work folder for one run, which all of `processes` are, while the block lasts.

    The first one's error is noted there. Raises FolderOccupied, on all of them, while another run lives; a killed one
    holds nothing. On a file system without locks nothing is kept apart.
    """
    with contextlib.ExitStack() as stack:
        occupied = stack.enter_context(take(folder)) if processes.is_first else ""
        if occupied := processes.hand_out(occupied):
            raise FolderOccupied(occupied)
        try:
            yield
        except TrainingStopped:
            raise
        except Exception as error:
            if processes.is_first:  # the others mostly fail of the same
                with contextlib.suppress(OSError):  # a full disk may be the error
                    Journal(folder / "journal.jsonl").write("error", message=str(error))
            raise


@contextlib.contextmanager
def take(folder: Path) -> Iterator[str]:
    """Hold the folder's lock and say there who does: nothing, or why it cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / HOLDER
    with hold(folder / LOCK) as state:
        if state == "taken":
            yield describe_holder(folder)
            return
        values = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_whole(holder, json.dumps(values).encode())
        try:
            yield ""
        finally:
            holder.unlink(missing_ok=True)


def describe_holder(folder: Path) -> str:
    """Which run has the folder, and what to do about it."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        who = f"process {found['process']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or is about to end
        who = "another process"
    return (
        f"the work folder {folder} is in use by {who}; wait for that run, stop it (on SIGTERM it saves, and "
        "this command goes on from there), or give another --work folder"
    )
