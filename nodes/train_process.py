"""The trainer as a process of its own, which ends with ComfyUI in whatever way that ends."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import folder_paths

PACK = Path(__file__).resolve().parent.parent
COMFYUI = Path(folder_paths.__file__).resolve().parent
NEEDED = ("accelerate", "filelock", "tqdm")
TAIL = 64 * 1024  # bytes of the log that are looked at


class TrainerError(RuntimeError):
    """The trainer ended without a student; the message has the end of its log."""


class TrainerProcess:
    """A started trainer; it has to end, by itself or by `kill`, before the object goes."""

    def __init__(self, arguments: Sequence[str], log: Path):
        self.log = log
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                build_command(arguments),
                cwd=PACK,
                env=build_environment(),
                stdin=subprocess.PIPE,  # the leash: see the trainer's --stop-with-parent
                stdout=output,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in ComfyUI's terminal is for ComfyUI.
                start_new_session=os.name != "nt",
                **apart,
            )

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within this time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_stop(self) -> None:
        """Let it save and end; asking again changes nothing."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()

    def kill(self) -> None:
        """End it at once; what it did since its last save is lost."""
        self.ask_to_stop()
        self.process.kill()
        self.process.wait()

    def check(self) -> None:
        """Raise TrainerError unless it has ended well."""
        code = self.process.returncode
        self.ask_to_stop()
        if code:
            raise TrainerError(f"the trainer {describe_end(code)}. The end of its log:\n{read_tail(self.log)}")


def build_command(arguments: Sequence[str], isolated: bool = bool(sys.flags.isolated)) -> list[str]:
    """The trainer's command; an isolated Python, as the portable ComfyUI's, heeds neither its folder nor PYTHONPATH."""
    if not isolated:
        return [sys.executable, "-m", "dkd_trainer", *arguments]
    start = (
        f"import runpy, site; site.addsitedir({str(COMFYUI)!r}); site.addsitedir({str(PACK)!r}); "
        "runpy.run_module('dkd_trainer', run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", start, *arguments]


def build_environment() -> dict[str, str]:
    """ComfyUI's environment, with ComfyUI to be imported from."""
    paths = [str(COMFYUI), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **told}


def list_needed() -> list[str]:
    """What the trainer imports beyond ComfyUI's own; from Python 3.11 on a reader of TOML comes with it."""
    return [*NEEDED, *([] if sys.version_info >= (3, 11) else ["tomli"])]


def check_needs(needed: Sequence[str] = ()) -> None:
    """Raise TrainerError where a library is missing, one of all that the trainer needs unless it is said which."""
    if missing := [name for name in needed or list_needed() if importlib.util.find_spec(name) is None]:
        raise TrainerError(
            f'DKD Train needs {" and ".join(missing)}; run "{sys.executable}" -m pip install {" ".join(missing)}, then '
            "queue again"
        )


def describe_end(code: int) -> str:
    if code == -9:
        return "was killed (signal 9), perhaps because the memory was used up"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"


def read_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log; of a progress bar, only what it showed last."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    shown = (re.split("\r", line.rstrip("\r"))[-1].strip() for line in text.split("\n"))
    return "\n".join([line for line in shown if line][-lines:])
