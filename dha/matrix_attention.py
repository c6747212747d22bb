"""Attention as plain matrix products, on processors where PyTorch's fused kernel is slower than they are.

The logits of a short context fit into a processor's caches: nothing needs to be fused to keep them there, and what
counts is how fast matrices are multiplied. PyTorch's kernel prepares its blocks of bf16 for AMX alone; with AVX512_BF16
it multiplies them at a fifth of the pace of a linear layer (one AMD EPYC, PyTorch 2.13).
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from .landmarks import place_landmarks

LOGITS = 3 << 20  # of a slice, for each thread: larger ones outgrow the caches, smaller ones are many calls
LEAST_QUERIES = 64  # of a slice: thinner products are slow ones
ENOUGH = 32  # tokens to say how long queries and keys are and where the middle of all keys is
REACH = 64.0  # of logits: bf16 has them to 0.13 there, and to less than a hundredth where most of them are
LANES = 32  # numbers of bf16 that AVX512 takes at a time; rows that end between take softmax up to twice as long
MANY = 1024  # keys, from which on the last, cut numbers of a row count for little
FEW = 8  # times as many keys as empty ones: then these cost less than they spare
LEAST_LOGITS = 1 << 18  # of a picture: to start several products takes longer than to fuse so few


def suits_products(q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether products are the faster attention of q (B, M, C) to k (B, N, C), and logits small enough for bf16.

    They are faster in bf16 with AVX512_BF16 and without AMX, not with gradients, of which slices have none, nor where
    torch.compile is at work.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if heads * q.shape[1] * k.shape[1] < LEAST_LOGITS or find_room(k.shape[1]) < LEAST_QUERIES:
        return False
    return multiplies_bf16() and find_reach(q, k, heads) <= REACH


@cache
def multiplies_bf16() -> bool:
    """Whether this processor does so by AVX512_BF16 and not by AMX, as far as this version of PyTorch can say."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16")) and not known.get("amx_bf16", True)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(c)) v of q (B, M, C) and k, v (B, N, C) in `heads` heads of c channels; without gradients.

    Logits are rounded to the precision of q, which counts for less the smaller they are. So keys are taken from a mean
    of theirs: that adds the same number to all logits of a query, and changes nothing else.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attend_by_products, (q, k, v), q, k, v, heads)
    empty, scale = count_empty(k.shape[1]), (q.shape[2] // heads) ** -0.5
    out, k = torch.empty_like(q), centre_keys(k, heads, empty)
    v = nn.functional.pad(v, (0, 0, 0, empty)) if empty else v
    group, rows = choose_slice(heads, q.shape[1], v.shape[1])
    buffer = q.new_empty(group * rows * v.shape[1])
    laid = (view_heads(q, heads), k, view_heads(v, heads), view_heads(out, heads))
    for queries, keys, values, found in zip(*(split_heads(part, group) for part in laid), strict=True):
        for few, place in zip(queries.split(rows, -2), found.split(rows, -2), strict=True):
            attend_slice(few, keys, values, scale, empty, buffer, place)
    return out


def attend_slice(q: Tensor, k: Tensor, v: Tensor, scale: float, empty: int, buffer: Tensor, out: Tensor) -> None:
    """Attention of one head, q (M, c), or of several, (heads, M, c), into `out`, with the logits in a `buffer`.

    The last `empty` keys are none. One head is multiplied as it lies in memory; of several, PyTorch makes copies of
    queries and values, which cost little where they are small enough to be handled together.
    """
    logits = buffer[: q.shape[:-1].numel() * k.shape[-2]].view(*q.shape[:-1], -1)
    add, multiply = (logits.addmm_, torch.mm) if q.dim() == 2 else (logits.baddbmm_, torch.bmm)
    add(q, k.mT, beta=0, alpha=scale)
    if empty:
        logits[..., -empty:] = -torch.inf
    multiply(torch.softmax(logits, -1, out=logits), v, out=out)


def pick_some(x: Tensor) -> Tensor:
    """Evenly spread tokens of x (B, N, C), as landmarks are not all of one column; all of them where they are few."""
    few = x.shape[1] <= ENOUGH
    return x if few else x.index_select(1, place_landmarks(ENOUGH, x.shape[1] // ENOUGH, ENOUGH, x.device))


def find_middle(k: Tensor) -> Tensor:
    """The mean (B, 1, C) of some keys k (B, N, C)."""
    return pick_some(k).mean(1, keepdim=True)


def find_reach(q: Tensor, k: Tensor, heads: int) -> float:
    """How large logits of q (B, M, C) and k (B, N, C) can be, by the longest of some: |q| |k| / sqrt(c), keys as taken.

    Most are a small part of that, as few queries point the way of a key.
    """
    q, k = pick_some(q), pick_some(k)
    parts = (part.unflatten(2, (heads, -1)) for part in (q, k - find_middle(k)))
    longest, farthest = (part.float().norm(dim=-1).amax(1) for part in parts)
    return (longest * farthest).max().item() * (q.shape[2] // heads) ** -0.5


def choose_slice(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """Of how many heads, and how many queries of each, the logits are to be in the caches at once."""
    room = max(1, find_room(keys))
    if room >= queries:
        return max(1, min(heads, LOGITS // (queries * keys))), queries
    slices = -(-queries // room)
    return 1, -(-queries // slices)


def count_empty(keys: int) -> int:
    """How many keys to add that count for nothing, so that softmax is faster; none where products take as much more."""
    empty = -keys % LANES
    return empty if MANY > keys > FEW * empty else 0


def find_room(keys: int) -> int:
    """How many queries' logits a slice has room for."""
    return LOGITS * torch.get_num_threads() // keys


def view_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, N, C) as (B, heads, N, c), nothing copied."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def centre_keys(k: Tensor, heads: int, empty: int) -> Tensor:
    """Keys k (B, N, C) from their middle, with `empty` zeros behind them, (B, heads, N + empty, c).

    As they are written anew they are laid head by head: products of several heads would make such copies.
    """
    parts = view_heads(k, heads)
    laid = k.new_empty(*parts.shape[:2], k.shape[1] + empty, parts.shape[3])
    torch.sub(parts, view_heads(find_middle(k), heads), out=laid[:, :, : k.shape[1]])
    laid[:, :, k.shape[1] :] = 0
    return laid


def split_heads(x: Tensor, group: int) -> list[Tensor]:
    """Views of x (B, heads, N, c), picture by picture: (N, c) of each of its heads, or (group or fewer, N, c)."""
    return [part for picture in x for part in (picture if group == 1 else picture.split(group))]
