"""What commands that measure share: how a share is read, and how they end, with their files or with one sentence."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from dha.presets import NO_CAP, Preset, Stretch

from ..engine.state import TrainingStopped
from ..host import ensure_comfy, explain_shortage


def parse_share(what: str, of: str, text: str) -> float:
    """A number for an option, `what` it is and `of` what a share; raises ArgumentTypeError outside (0, 1)."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{what} {text!r}, expected a share of the {of} between 0 and 1")
    return share


def parse_landmarks(text: str) -> int:
    """A number of landmarks for an option; raises ArgumentTypeError for anything but a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"landmarks {text!r}, expected a whole number from 0 on")
    return int(text)


def parse_stretches(text: str) -> Preset:
    """`0.125:0.5,0.25:0.9:plain`: shares of the keys until shares of the schedule, `plain` without trained parts.

    Raises ArgumentTypeError where they are none or the ends do not rise.
    """
    stretches = []
    for part in text.split(","):
        share, end, *plain = part.split(":") if part.count(":") in (1, 2) else ("", "")
        if plain not in ([], ["plain"]):
            raise argparse.ArgumentTypeError(f"stretch {part!r}, expected SHARE:END or SHARE:END:plain")
        budget = parse_share("stretch", "keys", share)
        last = 1.0 if end in ("1", "1.0") else parse_share("stretch's end", "schedule", end)
        stretches.append(Stretch(budget, NO_CAP, last, trained=not plain))
    ends = [stretch.end for stretch in stretches]
    if ends != sorted(set(ends)):
        raise argparse.ArgumentTypeError(f"stretches {text!r}, expected ends that rise")
    return Preset(tuple(stretches))


def run_command(name: str, measure: Callable[[argparse.Namespace], Iterable[Path]], args: argparse.Namespace) -> None:
    """Run `measure` with ComfyUI importable and say what it wrote; ends the process when it is stopped or fails."""
    try:
        ensure_comfy(args.comfyui, getattr(args, "device", "auto"))
        with explain_shortage("--batch, or where it trains a larger --set train.accumulation."):
            for path in measure(args):
                print(f"wrote {path}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except (OSError, ValueError, ImportError, FloatingPointError, MemoryError) as error:
        sys.exit(f"dkd_trainer {name}: {error}")
