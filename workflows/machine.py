"""What a figure has to name beside it: the processor and the commit."""

import platform
import shlex
import subprocess
import sys
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


def describe_command(module: str) -> str:
    """The command line that runs now, with absolute paths cut to their last part: it is shown to others."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])
