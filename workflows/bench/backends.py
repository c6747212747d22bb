"""The attention kernels of a machine beside PyTorch's, in the form in which ComfyUI lets a model bring its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from .model import import_from_pack


def build_override(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    suits: Callable[[Tensor, Tensor, int], bool] = lambda _q, _k, _heads: True,
) -> Callable:
    """A kernel over (B, N, H, D) as ComfyUI's `optimized_attention_override`; calls with a mask keep its own kernel.

    So do those that it does not suit, by q and k (B, N, C) and the number of heads.
    """

    def override(function, q, k, v, heads, *args, **kwargs):
        if asks_more(args, kwargs) or not suits(q, k, heads):
            return function(q, k, v, heads, *args, **kwargs)
        return attend(*(t.unflatten(-1, (heads, -1)) for t in (q, k, v))).flatten(2)

    return override


def asks_more(args: tuple, kwargs: dict) -> bool:
    """Whether a call asks for a mask or another shape, for which it keeps ComfyUI's kernel."""
    named = [kwargs.get("mask") is not None, kwargs.get("skip_reshape"), kwargs.get("skip_output_reshape")]
    return bool(args) or any(named)


def load_xformers() -> Callable:
    from xformers.ops import memory_efficient_attention

    return build_override(memory_efficient_attention)


def load_sage() -> Callable:
    from sageattention import sageattn

    return build_override(lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD"))


def load_flash() -> Callable:
    from flash_attn import flash_attn_func

    return build_override(flash_attn_func)


def load_products() -> Callable:
    """The matrix products that short contexts are left to on some processors, here for whole attentions as well."""
    products = import_from_pack("dha.matrix_attention")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return products.attend_by_products(*(t.flatten(2) for t in (q, k, v)), q.shape[2])

    return build_override(attend, products.suits_products)


def refuse(*args, **kwargs) -> Tensor:
    """In the place of PyTorch's kernel, for one that is to show what it does itself."""
    raise RuntimeError("leaves attention like SD-2.1's to PyTorch's kernel in this precision, on this device")


BACKENDS = {"xformers": load_xformers, "sage": load_sage, "flash": load_flash, "products": load_products}


@torch.inference_mode()
def find_backends(device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Kernels that answer on this device in this precision, PyTorch's first, and why the others do not."""
    found, missing = ["sdpa"], {}
    for name, load in BACKENDS.items():
        try:
            q = torch.randn(1, 1024, 128, device=device, dtype=dtype)
            if load()(refuse, q, q, q, 2).isfinite().all():
                found.append(name)
            else:
                missing[name] = "gives numbers that are not finite"
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return found, missing
