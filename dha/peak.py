"""The memory that a computation takes at its peak, beyond what was there before."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchFunctionMode):
    """Counts the bytes of tensors made while it is on and still alive; slow, so do not time the same run.

    Scratch space inside of a torch function is not seen.
    """

    def __init__(self):
        super().__init__()
        self.held = self.highest = 0
        self.storages: dict[int, weakref.ref] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(made):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in given:
                self.count(leaf.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage that is new, until it dies."""
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def release(_):
            del self.storages[key]
            self.held -= size

        self.storages[key] = weakref.ref(storage, release)
        self.held += size
        self.highest = max(self.highest, self.held)


@dataclass
class Peak:
    """Bytes at the highest point beyond those at the start."""

    bytes: int = 0


@contextlib.contextmanager
def watch_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of what runs inside: the allocator's where the device keeps it, else that of live tensors."""
    peak = Peak()
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "reset_peak_memory_stats"):
        before = backend.memory_allocated(device)
        backend.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = backend.max_memory_allocated(device) - before
    else:
        with LiveTensors() as live:
            yield peak
        peak.bytes = live.highest
