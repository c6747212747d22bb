"""What every training loop here shares: states that survive a kill, and learning rates with warm-up."""

import math
import os
from pathlib import Path

import torch


def save_state(path: Path, state: dict) -> None:
    """Write a training state so that a kill at any moment leaves the old or the new one.

    Raises OSError, with the old one kept, when it cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(
            f"the state {path.name} could not be written ({error}); what was saved before is kept: make room on the "
            "disk and give the same command again"
        ) from error


def load_state(path: Path) -> dict | None:
    """The last saved state, or None before the first save; tensors and plain values only."""
    return torch.load(path, weights_only=True) if path.exists() else None


def cosine_rate(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


def trapezoid_rate(step: int, steps: int, warmup: int = 200, decay: float = 0.25) -> float:
    """Learning-rate factor: linear warm-up, constant, linear to zero at the end; `steps` may grow on a resume."""
    return min((step + 1) / warmup, 1.0, max(0.0, (steps - step) / (decay * steps)))
