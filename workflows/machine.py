"""What a figure has to name beside it: the commit, and whether it stood changed."""

import subprocess

from .server import PACK


def read_commit() -> str:
    """The checkout's commit; `unknown` outside of git."""
    try:
        command = ["git", "-C", str(PACK), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
