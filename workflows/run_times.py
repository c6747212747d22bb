"""How long the shipped workflows take, each once and each from nothing, on a server that has run one before."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dha.whole_file import write_whole

from .machine import Machine
from .server import Graph

NAME = "run-times"
NOTE = (
    "Seconds from queueing to the last result, everything included: each workflow reads its models anew and computes "
    "everything itself, whatever ran before. Each ran once: read them as orders of magnitude."
)
UNUSED = "timed"  # an input that no node has


def make_own(graph: Graph, mark: str) -> Graph:
    """The graph, to be run as if no other had been: nothing that was computed under another mark is taken over.

    ComfyUI finds earlier results by all inputs of a node and of those before it; it hands over the known ones alone.
    """
    return {key: {**entry, "inputs": {**entry["inputs"], UNUSED: mark}} for key, entry in graph.items()}


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
