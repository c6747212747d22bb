"""What is measured and does not fit into the memory, on whatever device."""

import contextlib
from collections.abc import Iterator

import comfy.model_management

# What PyTorch says of it as a plain RuntimeError: MPS, the CPU, the CPU on Windows, and MPS of a single tensor.
NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "Invalid buffer size")


@contextlib.contextmanager
def spare_memory() -> Iterator[None]:
    """End the block where a tensor does not fit, and give back what it took; every other error is raised."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        comfy.model_management.soft_empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a tensor did not fit."""
    return isinstance(error, comfy.model_management.OOM_EXCEPTION) or any(words in str(error) for words in NO_ROOM)
