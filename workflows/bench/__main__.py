"""Time one UNet step of SD-2.1 inside ComfyUI, DHA against its peers: `python -m workflows.bench --comfyui PATH`."""

import argparse
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

import torch

from ..machine import describe_command
from ..server import find_comfyui
from .report import Run, describe_machine, write_report
from .subjects import DTYPES, KINDS, build_model, build_subjects, load_model
from .timing import Size, measure_size, share_time

SIZES = (Size(512, 512), Size(768, 768), Size(1024, 1024))
MINI_SIZES = (Size(512, 256),)  # HyperTile cuts nothing below 512
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


def parse_budget(text: str) -> float:
    """A share of the tokens; raises ArgumentTypeError outside (0, 1)."""
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < 1:
        raise argparse.ArgumentTypeError(f"budget {text!r}, expected a share of the tokens between 0 and 1")
    return budget


def parse_count(text: str) -> int:
    """A whole number from 1; raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workflows.bench", description=__doc__)
    parser.add_argument("--comfyui", help="folder of a ComfyUI (default: the one on PYTHONPATH, or COMFYUI_PATH)")
    parser.add_argument("--sizes", type=parse_size, nargs="+", metavar="WxH", help="in pixels (512 768 1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and computation (%(default)s)")
    parser.add_argument("--batch", type=parse_count, default=1, help="rows of a UNet call, 2 with CFG (%(default)s)")
    parser.add_argument("--rounds", type=parse_count, default=5, help="at most, at each size (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, metavar="BUDGET", help="aim to end after this long; always one round a size"
    )
    parser.add_argument("--subjects", nargs="+", choices=KINDS, default=list(KINDS), help="beside unpatched (all)")
    parser.add_argument(
        "--budgets", type=parse_budget, nargs="+", default=[0.125], metavar="SHARE", help="of DHA's keys (0.125)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=Path, help="an SD-2.1 checkpoint instead of random weights")
    model.add_argument("--mini", action="store_true", help="the mini architecture, to try this program in seconds")
    parser.add_argument("--out", type=Path, default=Path("demo-output/bench"), help="of the report (%(default)s)")
    arguments = parser.parse_args()
    arguments.sizes = arguments.sizes or list(MINI_SIZES if arguments.mini else SIZES)
    return arguments


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
        "sizes": [str(size) for size in arguments.sizes],
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "budgets": arguments.budgets,
        "attention": "torch.nn.functional.scaled_dot_product_attention",
    }


def run_bench(arguments: argparse.Namespace) -> None:
    """Measure size by size and keep the report up to date after every round."""
    end = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
    device = choose_device(arguments.device)
    import comfyui_version

    command = describe_command("workflows.bench")
    run = Run(describe_machine(device, comfyui_version.__version__, command), describe_settings(arguments), [])
    stem = f"speed-{'mini-' if arguments.mini else ''}{device.type}-{arguments.dtype}"
    dtype = DTYPES[arguments.dtype]
    print(f"{run.settings['weights']}, {arguments.dtype} on {run.machine['device']}", flush=True)
    model = load_model(arguments.checkpoint, dtype) if arguments.checkpoint else build_model(dtype, arguments.mini)
    subjects = build_subjects(model, arguments.subjects, arguments.budgets)
    done = []
    for index, size in enumerate(arguments.sizes):

        def save(result):
            run.results = [*done, result]
            write_report(arguments.out, stem, run)

        deadline = share_time(arguments.sizes, index, end)
        done.append(measure_size(subjects, size, arguments.batch, arguments.rounds, deadline, save))
    run.complete = True
    for size in write_report(arguments.out, stem, run)["sizes"]:
        ratios = [f"{item['name']} {item['ratio_to_unpatched']['median']:.2f}x" for item in size["subjects"][1:]]
        print(f"{size['width']}x{size['height']}, {size['rounds']} rounds: {', '.join(ratios)}")
    print(f"Report: {arguments.out / stem}.md, .json, .png")


def main() -> None:
    arguments = parse_arguments()
    try:
        ensure_comfy(arguments.comfyui)
        run_bench(arguments)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
