"""What a result has to name beside it: the command, the commit and the versions that made it."""

import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .host import ROOT

ABSOLUTE = re.compile(r"""(?:^|(?<=[=,\["']))(?:/|[A-Za-z]:[\\/])[^,"'\]]+""")  # within an argument


def current_commit() -> str:
    """The repository's commit, with `-dirty` where files differ from it, or `unknown` outside one."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def current_command(module: str) -> str:
    """The command line that runs now without the places of this machine: it goes into records for others.

    Absolute paths start at the repository's root where they are in it, and else are cut to their last part.
    """
    return shlex.join(["python", "-m", module, *(ABSOLUTE.sub(cut_path, argument) for argument in sys.argv[1:])])


def cut_path(found: re.Match[str]) -> str:
    """What others may read of an absolute path."""
    path = Path(found[0]).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else Path(found[0]).name


def name_processor() -> str:
    """The processor as its maker calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def list_versions() -> dict[str, str]:
    """Versions of the packages that decide a training's numbers."""
    found = {}
    for name in ("torch", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
