"""Time SD-2.1 inside ComfyUI, DHA against its peers: `python -m workflows.bench --comfyui PATH`.

With a CUDA device one command measures everything: UNet steps, single layers, whole pictures, every attention kernel,
eager and compiled.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

from dkd_trainer.evidence.commands import parse_share
from dkd_trainer.record import current_command

from ..server import find_comfyui
from .backends import find_backends
from .contest import Forecast, describe_error, hold_contest, share_time
from .model import DTYPES, build_model, load_model
from .report import Result, Run, describe_machine, write_heading, write_report
from .schedule import PARTS, SIZES, Task, plan_tasks
from .step import Size
from .subjects import TITLES, build_subjects

SAVE_EVERY = 10.0  # seconds: a report with its chart takes half a second, a round on a GPU may take less
SHORTEST = 20.0  # seconds that a contest may take even where its share is less: the first one wakes the device
RANDOM_NOTE = "The weights are random: they do not change the time of a step, and nothing here speaks of quality."
MINI_NOTE = "The mini architecture only tries the bench out: its figures say nothing about the full-size one."


def parse_size(text: str) -> Size:
    """`512` or `768x512` in pixels; raises ArgumentTypeError for anything that makes no latent."""
    sides = text.lower().split("x")
    try:
        width, height = map(int, sides * 2 if len(sides) == 1 else sides)
    except ValueError:
        raise argparse.ArgumentTypeError(f"size {text!r}, expected pixels such as 512 or 768x512") from None
    if min(width, height) < 64 or width % 8 or height % 8:
        raise argparse.ArgumentTypeError(f"size {text!r}, expected sides of at least 64 pixels that 8 divides")
    return Size(width, height)


def parse_count(text: str) -> int:
    """A whole number from 1; raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workflows.bench", description=__doc__)
    add = parser.add_argument
    add("--comfyui", help="folder of a ComfyUI (default: the one on PYTHONPATH, or COMFYUI_PATH)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--parts", nargs="+", choices=PARTS, help="what to measure (CPU: step; CUDA: everything)")
    add("--by-layer", action="store_true", help="single self-attentions alone, like --parts layers")
    add("--profile", action="store_true", help="where the time of a hybrid layer goes, like --parts profile")
    add("--sizes", type=parse_size, nargs="+", metavar="WxH", help="in pixels (CPU: 512 768 1024; CUDA: up to 2048)")
    add("--layer-sides", type=int, nargs="+", help="of single layers' pictures (384 to 4096; profile: 512 to 1024)")
    add("--dtype", choices=DTYPES, help="of weights and computation (CPU: fp32; CUDA: bf16)")
    add("--batch", type=parse_count, nargs="+", help="rows of a UNet call, 2 with guidance (CPU: 1; CUDA: 1 2)")
    add("--steps", type=parse_count, default=20, help="of a whole picture (%(default)s)")
    add("--rounds", type=parse_count, default=5, help="at most, of each contest (%(default)s)")
    add("--seconds", type=float, metavar="BUDGET", help="end after about this long; what does not fit is left out")
    families = sorted({name.split("-")[0] for name in TITLES} | set(TITLES))
    add("--subjects", nargs="+", choices=families, default=families, help="beside unpatched (all)")
    budget = partial(parse_share, "budget", "tokens")
    add("--budgets", type=budget, nargs="+", default=[], metavar="SHARE", help="DHA with these shares, too")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=Path, help="an SD-2.1 checkpoint instead of random weights")
    model.add_argument("--mini", action="store_true", help="the mini architecture, to try this program in seconds")
    add("--out", type=Path, default=Path("demo-output/bench"), help="of the report (%(default)s)")
    arguments = parser.parse_args()
    alone = [part for part, asked in (("layers", arguments.by_layer), ("profile", arguments.profile)) if asked]
    arguments.parts = arguments.parts or alone
    return arguments


def settle(arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in what depends on the device."""
    cuda = device.type == "cuda"
    arguments.parts = arguments.parts or (PARTS if cuda else ("step",))
    arguments.sizes = arguments.sizes or list(SIZES["mini" if arguments.mini else device.type])
    arguments.dtype = arguments.dtype or ("bf16" if cuda else "fp32")
    arguments.batch = arguments.batch or ([1, 2] if cuda else [1])


def ensure_comfy(path: str | None) -> None:
    """Make `import comfy` work: start this program again with ComfyUI first on PYTHONPATH where it is not there yet.

    Raises FileNotFoundError when no ComfyUI is given or found.
    """
    if path is None and importlib.util.find_spec("comfy") is not None:
        return
    comfyui = str(find_comfyui(path))
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if paths[:1] == [comfyui]:
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([comfyui, *paths])}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def choose_device(name: str) -> torch.device:
    """Settle ComfyUI's device and attention before it looks for them itself; raises RuntimeError without CUDA."""
    import comfy.cli_args

    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda was asked for, torch sees no CUDA device; use --device cpu or another torch")
    comfy.cli_args.args.cpu = name == "cpu" or not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def describe_settings(arguments: argparse.Namespace) -> dict:
    """What was asked for, as the report shows it."""
    weights = "SD-2.1 architecture, random weights"
    if arguments.mini:
        weights = "mini SD-2.1 architecture, random weights"
    elif arguments.checkpoint:
        weights = arguments.checkpoint.name
    return {
        "weights": weights,
        "note": "" if arguments.checkpoint else MINI_NOTE if arguments.mini else RANDOM_NOTE,
        "parts": list(arguments.parts),
        "sizes": [str(size) for size in arguments.sizes],
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
    }


def run_task(task: Task, device: torch.device, rounds: int, deadline: float, forecast: Forecast, result: Result, save):
    """Fill a result in; a task that cannot be set up leaves its error there."""
    if time.monotonic() >= deadline:
        result.error = "skipped: no time was left"
        return

    def keep(records):
        result.records = records
        save()

    try:
        entrants = task.enter()
        result.records = hold_contest(entrants, device, rounds, deadline, keep, forecast, task.title)
    except Exception as error:
        result.error = describe_error(error)
        print(f"{task.title}: {result.error}", flush=True)


def run_bench(arguments: argparse.Namespace) -> None:
    """Measure task by task and keep the report up to date, a few seconds behind: on a GPU a round takes less."""
    end = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
    device = choose_device(arguments.device)
    settle(arguments, device)
    import comfyui_version

    dtype, forecast = DTYPES[arguments.dtype], Forecast()
    command = current_command("workflows.bench")
    run = Run(describe_machine(device, comfyui_version.__version__, command), describe_settings(arguments), [])
    stem = f"speed-{'mini-' if arguments.mini else ''}{device.type}-{arguments.dtype}"
    print(f"{run.settings['weights']}, {arguments.dtype} on {run.machine['device']}", flush=True)
    subjects, backends = [], ["sdpa"]
    if set(arguments.parts) - {"layers", "profile"}:
        model = load_model(arguments.checkpoint, dtype) if arguments.checkpoint else build_model(dtype, arguments.mini)
        subjects = build_subjects(model, arguments.subjects, arguments.budgets)
    if "backends" in arguments.parts:
        backends, run.settings["missing_backends"] = find_backends(device, dtype)
    tasks = plan_tasks(arguments, subjects, backends, device)
    weights = [task.weight for task in tasks]

    saved = 0.0

    def save() -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVE_EVERY:
            write_report(arguments.out, stem, run)
            saved = time.monotonic()

    for index, task in enumerate(tasks):
        result = Result(task.kind, task.labels)
        run.results.append(result)
        deadline = min(end, max(share_time(weights, index, end), time.monotonic() + SHORTEST))
        run_task(task, device, min(arguments.rounds, task.rounds), deadline, forecast, result, save)
    run.complete = True
    print_summary(write_report(arguments.out, stem, run))
    print(f"Report: {arguments.out / stem}.md, .json, .png")


def print_summary(document: dict) -> None:
    """One line a contest."""
    for result in document["results"]:
        found = [f"{s['name']} {s['ratio']['median']:.2f}x" for s in result["subjects"][1:] if s.get("ratio")]
        missing = [s["name"] for s in result["subjects"] if "error" in s]
        line = f"{write_heading(result)}: {result['error'] or ', '.join(found)}"
        print(line + (f"; without figures: {', '.join(missing)}" if missing else ""))


def main() -> None:
    arguments = parse_arguments()
    try:
        ensure_comfy(arguments.comfyui)
        run_bench(arguments)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
