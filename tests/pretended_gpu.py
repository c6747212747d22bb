"""Tensors that pretend to be on a GPU: shapes, types and devices without values, where no GPU is.

PyTorch's fake tensors raise as on a GPU where an operation meets two devices or types, and where a value is asked for,
for which a GPU would be waited for. PyTorch without CUDA stops at gradients of such tensors: there are none here.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

GPU = torch.device("cuda:0")


class PlainOperations(TorchFunctionMode):
    """Some of Python's operations as what they are made of: PyTorch's own ask for a CUDA that is not there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


def take(x: Tensor, keys) -> Tensor:
    """x[keys]; keys are numbers, slices, None, tensors or an ellipsis."""
    keys = keys if isinstance(keys, tuple) else (keys,)
    dim, lookups = 0, {}
    for place, key in enumerate(keys, start=1):
        if key is Ellipsis:
            dim = x.dim() - sum(later is not None for later in keys[place:])
        elif key is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(key, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, key.start, key.stop, key.step or 1), dim + 1
        elif isinstance(key, int):
            x = x.select(dim, key)
        else:
            lookups[dim], dim = key, dim + 1
    if not lookups:
        return x
    return torch.ops.aten.index.Tensor(x, [lookups.get(dim) for dim in range(max(lookups) + 1)])


PLAIN = {
    Tensor.__getitem__: take,
    Tensor.contiguous: lambda x: x.clone(memory_format=torch.contiguous_format),
    Tensor.copy_: torch.ops.aten.copy_.default,
}


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """While it lasts new tensors have no values, and may be on `GPU`."""
    with FakeTensorMode(allow_non_fake_inputs=True), PlainOperations():
        yield


@contextmanager
def autocast() -> Iterator[None]:
    """bf16 autocast of a GPU, which PyTorch's own context leaves out where there is none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def move(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module whose weights are of that type and pretend to be on the GPU."""
    with _disable_current_modes():
        module = copy.deepcopy(module)
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    placed = torch.empty(tensor.shape, device=GPU, dtype=kind)
                    kept[name] = nn.Parameter(placed, False) if isinstance(tensor, nn.Parameter) else placed
    return module
