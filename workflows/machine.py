"""What a figure has to name beside it: machine, versions, command, commit and whether that stood changed."""

import os
import platform
from dataclasses import dataclass

from dkd_trainer.record import current_command, current_commit, name_processor

from .server import Server


@dataclass(frozen=True)
class Machine:
    """Where and with what the figures were taken."""

    processor: str
    cores: int
    device: str
    comfyui: str
    torch: str
    python: str
    commit: str
    command: str


def describe_machine(server: Server, module: str) -> Machine:
    """The machine as this process and its server see it; `module` is what runs."""
    stats = server.get("/system_stats")
    return Machine(
        processor=name_processor(),
        cores=os.cpu_count() or 0,
        device=stats["devices"][0]["name"],
        comfyui=stats["system"]["comfyui_version"],
        torch=stats["system"]["pytorch_version"],
        python=platform.python_version(),
        commit=current_commit(),
        command=current_command(module),
    )
