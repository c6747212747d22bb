"""Seconds of what a device does, from when it starts to when it is done."""

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a no-op where work is not queued."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait(*([] if device.type == "mps" else [device]))


def time_runs(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """Seconds a run, mean of `count` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / count
