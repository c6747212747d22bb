"""Seconds of what a device does, from when it starts to when it is done."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a no-op where work is not queued."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait() if device.type == "mps" else wait(device)


def time_runs(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """Seconds a run, mean of `count` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / count


def fill_lap(seconds: float, lap: float, most: int) -> int:
    """How many runs of so many `seconds` take a `lap` of seconds or longer: one or more, at most `most`."""
    return max(1, min(most, math.ceil(lap / max(seconds, 1e-9))))
