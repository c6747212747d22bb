"""What a result has to name beside it: the command, the commit and the versions that made it."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def current_commit() -> str:
    """The repository's commit, or `unknown` outside one."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return (
            subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
            or "unknown"
        )
    except OSError:
        return "unknown"


def current_command(module: str) -> str:
    """The command line that runs now, with absolute paths cut to their last part: it goes into records for others."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])


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
