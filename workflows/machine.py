"""What a figure has to name beside it: the processor and the commit."""

import platform
import subprocess
from pathlib import Path

from .server import PACK


def name_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_commit() -> str:
    """The checkout's commit; `unknown` outside of git."""
    try:
        command = ["git", "-C", str(PACK), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
