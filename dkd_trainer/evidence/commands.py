"""What commands that measure share: how a share is read, and how they end, with their files or with one sentence."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..engine.state import TrainingStopped
from ..host import ensure_comfy


def parse_share(what: str, of: str, text: str) -> float:
    """A number for an option, `what` it is and `of` what a share; raises ArgumentTypeError outside (0, 1)."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{what} {text!r}, expected a share of the {of} between 0 and 1")
    return share


def run_command(name: str, measure: Callable[[argparse.Namespace], Iterable[Path]], args: argparse.Namespace) -> None:
    """Run `measure` with ComfyUI importable and say what it wrote; ends the process when it is stopped or fails."""
    try:
        ensure_comfy(args.comfyui, getattr(args, "device", "auto"))
        for path in measure(args):
            print(f"wrote {path}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        sys.exit(f"dkd_trainer {name}: {error}")
