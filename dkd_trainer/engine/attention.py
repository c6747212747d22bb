"""The student's attention while it is trained, on PyTorch's fast kernels."""

import torch.nn.functional as F
from torch import Tensor

from dha.patch import plain_attention

LANES = 8  # channels that a head is widened by: CUDA's kernels want multiples of 8


def trained_attention(q: Tensor, k: Tensor, v: Tensor, options: dict, mask: Tensor | None) -> Tensor:
    """`dha.patch.plain_attention` for a mask (B, 1, 1, m) that has a gradient: it travels as one more channel.

    With such a mask PyTorch would keep logits (B, heads, N, m) for the gradients, or that many gradients of the mask.
    """
    if mask is None or not mask.requires_grad:
        return plain_attention(q, k, v, options, mask)
    q, k, v = (tensor.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for tensor in (q, k, v))
    width = q.shape[-1]
    q = F.pad(F.pad(q, (0, 1), value=width**0.5), (0, LANES - 1))
    k = F.pad(k, (0, LANES)) + F.pad(mask.transpose(-1, -2), (width, LANES - 1))
    out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, LANES)), scale=width**-0.5)
    return out[..., :width].transpose(1, 2).flatten(2)
