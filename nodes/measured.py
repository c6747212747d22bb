"""What was measured of speed and error, as shipped: which layers pay, and the table in the presets' tooltip."""

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..dha.presets import PRESETS, Preset

FILE = Path(__file__).with_name("measured.json")
FORMAT = "dha-measured-2"  # before, a preset had one speed


def read_measured(file: Path = FILE) -> dict[str, Any]:
    """The shipped figures (written by `python -m workflows.bench.measured`); none where the file is missing or odd."""
    none = {"format": FORMAT, "layers": [], "presets": {}}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return none
    except (OSError, ValueError) as error:
        logging.warning("DHA: %s cannot be read (%s); defaults are used. Get the pack again.", file, error)
        return none
    return found if isinstance(found, dict) and found.get("format") == FORMAT else none


def describe_presets(measured: dict[str, Any]) -> str:
    """One line a preset with what was measured of it; what was not is left out."""
    lines = []
    for name, preset in PRESETS.items():
        line = f"{name}: {describe_stretches(preset)}"
        figures = measured["presets"].get(name, {})
        if steps := figures.get("speed"):
            speeds = {size: 1 / preset.relate_sampling([1 / s for s in found]) for size, found in steps.items()}
            line += "; " + ", ".join(f"{size} {speedup:.2f}x" for size, speedup in speeds.items())
        if "psnr" in figures:
            line += f"; {figures['psnr']:.1f} dB"
        if "psnr_training_free" in figures:
            line += f", {figures['psnr_training_free']:.1f} dB without a student"
        lines.append(line)
    return "\n".join([*lines, *measured["presets"].get("notes", [])])


def describe_stretches(preset: Preset) -> str:
    """How many tokens answer in a sampling: `12.5 % of the tokens, 1152 at most, from 50 % of the schedule on ...`."""
    first = preset.stretches[0]
    words = [f"{100 * first.token_budget:.4g} % of the tokens, {first.max_tokens} at most"]
    for before, stretch in pairwise(preset.stretches):
        share = f"{100 * stretch.token_budget:.4g} %, {stretch.max_tokens}"
        words.append(f"from {100 * before.end:.3g} % of the schedule on {share}")
    if preset.end < 1:
        words.append(f"in the last {100 * (1 - preset.end):.3g} % all")
    return ", ".join(words)
