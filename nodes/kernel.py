"""Whose attention a student runs on: the user's own kernel, or matrix products where those are faster."""

from comfy.ldm.modules import attention
from torch import Tensor

from ..dha.matrix_attention import attend_by_products, suits_products

COMFYUI_KERNELS = ("attention_pytorch", "attention_sub_quad", "attention_split")  # for processors


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict, mask: Tensor | None) -> Tensor:
    """Attention over q (B, N, C) and k, v (B, m, C) by the user's own kernel; with a mask (B, 1, 1, m) by PyTorch's.

    Some kernels silently ignore a mask. They are looked up at every call, as ComfyUI does: other packs replace them.
    A short context (m is not N) is left to matrix products where they are faster than ComfyUI's kernel.
    """
    if mask is None and q.shape[1] != k.shape[1] and multiplies(q, k, options):
        return attend_by_products(q, k, v, options["n_heads"])
    kernel = attention.optimized_attention if mask is None else attention.attention_pytorch
    passed = {"transformer_options": options} if mask is None else {"mask": mask}
    return kernel(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), **passed)


def multiplies(q: Tensor, k: Tensor, options: dict) -> bool:
    """Whether attention is to be matrix products: they suit it, and no kernel was chosen that is not ComfyUI's own."""
    own = [getattr(attention, name, None) for name in COMFYUI_KERNELS]
    chosen = attention.optimized_attention in own and "optimized_attention_override" not in options
    return chosen and suits_products(q, k, options["n_heads"])
