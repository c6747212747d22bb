"""Whose attention a student runs on: the user's own kernel, or matrix products where those are faster."""

from comfy.ldm.modules import attention
from torch import Tensor

from ..dha.matrix_attention import attend_by_products, suits_products


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict, mask: Tensor | None) -> Tensor:
    """Attention over q (B, N, C) and k, v (B, m, C) by the user's own kernel; with a mask (B, 1, 1, m) by PyTorch's.

    Some kernels silently ignore a mask. They are looked up at every call, as ComfyUI does: other packs replace them.
    """
    kernel = attention.optimized_attention if mask is None else attention.attention_pytorch
    passed = {"transformer_options": options} if mask is None else {"mask": mask}
    return kernel(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), **passed)


def attend_short(q: Tensor, k: Tensor, v: Tensor, options: dict, mask: Tensor | None) -> Tensor:
    """`attend` for short contexts: by matrix products where ComfyUI would take PyTorch's kernel and they are faster.

    ComfyUI's other kernels for processors compute SD-2.1's logits in fp32, and those of other packs were chosen.
    """
    if mask is None and is_pytorch(options) and suits_products(q, k, options["n_heads"]):
        return attend_by_products(q, k, v, options["n_heads"])
    return attend(q, k, v, options, mask)


def is_pytorch(options: dict) -> bool:
    """Whether attention is ComfyUI's own call of PyTorch's kernel: nobody replaced it, or overrides it here."""
    kernel = attention.optimized_attention
    ours = kernel is attention.attention_pytorch and kernel.__module__ == attention.__name__
    return ours and "optimized_attention_override" not in options
