"""How long the shipped workflows take, each once, in the order of the list, on a server that has just started."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dha.whole_file import write_whole

from .machine import Machine

NAME = "run-times"
NOTE = (
    "Seconds from queueing to the last result, everything included; the first one also loads the models, and what an "
    "earlier one computed is not computed again. Each ran once: read them as orders of magnitude."
)


def write_times(folder: Path, seconds: Mapping[str, float], machine: Machine) -> None:
    """Write `run-times.json` and `run-times.md` of seconds by workflow."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"note": NOTE, "machine": asdict(machine), "seconds": {name: round(s, 1) for name, s in seconds.items()}}
    write_whole(folder / f"{NAME}.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_whole(folder / f"{NAME}.md", write_table(seconds, machine).encode())


def write_table(seconds: Mapping[str, float], machine: Machine) -> str:
    """The same for people."""
    rows = [f"| {name} | {taken:.1f} |" for name, taken in seconds.items()]
    where = (
        f"{machine.processor}, {machine.cores} cores, device {machine.device}; ComfyUI {machine.comfyui}, torch "
        f"{machine.torch}, commit {machine.commit}; `{machine.command}`"
    )
    head = ["# Run times of the workflows", "", NOTE, "", "| workflow | s |", "|---|---:|"]
    return "\n".join([*head, *rows, "", where, ""])
