"""The slow oracle: hybrid attention written token by token from its definition, for tests of the fast path."""

import math

import torch
from torch import Tensor

from .hybrid import HybridSite
from .landmarks import GOLDEN, ONE, RIDGE, ROOT, WIDTH
from .memory import SHARPNESS, Memory
from .routing import ContextPlan


def attend_hybrid(site: HybridSite, attention, x: Tensor, emb: Tensor, plan: ContextPlan, heads: int) -> Tensor:
    """Hybrid self-attention of x (B, N, C) with the layer's own to_q, to_k, to_v, to_out; returns (B, N, C)."""
    return torch.stack([attend_one(site, attention, x[b], emb[b], plan, heads) for b in range(len(x))])


def attend_one(site: HybridSite, attention, x: Tensor, emb: Tensor, plan: ContextPlan, heads: int) -> Tensor:
    """One sample x (N, C): softmax over chosen, grid and memory keys, each key weighed by the tokens it stands for."""
    keys, values, log_weights = list_keys(site, x, emb, plan)
    q = attention.to_q(site.correct("q", x)).unflatten(-1, (heads, -1))
    k = attention.to_k(site.correct("k", keys)).unflatten(-1, (heads, -1))
    v = attention.to_v(site.correct("v", values)).unflatten(-1, (heads, -1))
    mixed = torch.stack([attend_row(q[n], k, v, log_weights) for n in range(len(x))])
    if plan.landmarks:
        k, v = (
            f(site.correct(n, x)).unflatten(-1, (heads, -1)) for n, f in (("k", attention.to_k), ("v", attention.to_v))
        )
        mixed = mixed + carry_missed(q, k, v, mixed, list_landmarks(plan))
    out = site.correct("out", attention.to_out(mixed.flatten(1)))
    return out if site.local is None else out + mix_neighbours(site, x, emb, plan)


def list_landmarks(plan: ContextPlan) -> list[int]:
    """The numbers of the landmarks: as many to each row, and from each to the next column a golden section of a row."""
    numbers = []
    for n in range(plan.landmarks):
        row = math.floor((n + 0.5) * plan.height / plan.landmarks)
        numbers.append(row * plan.width + math.floor(n * GOLDEN / ONE % 1 * plan.width))
    return numbers


def attend_row(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor) -> Tensor:
    """One query (heads, d) over keys and values (m, heads, d) with log-weights (m,); returns (heads, d)."""
    outputs = []
    for h in range(len(q)):
        logits = k[:, h] @ q[h] / q.shape[-1] ** 0.5 + log_weights
        mass = (logits - logits.max().detach()).exp()
        outputs.append((mass[:, None] * v[:, h]).sum(0) / mass.sum())
    return torch.stack(outputs)


def carry_missed(q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, marks: list[int]) -> Tensor:
    """What `mixed` (N, heads, d) of queries q misses of all keys, known at `marks` and by regression elsewhere.

    For each head the weights W solve (phi(l) + RIDGE I) W = e - e' for what each landmark misses, e, of mean e'.
    """
    zeros = q.new_zeros(len(k))
    missed = torch.stack([attend_row(q[n], k, v, zeros) - mixed[n] for n in marks])
    carried = []
    for h in range(q.shape[1]):
        points = torch.stack([q[n, h] for n in marks])
        centre, mean, metric = points.mean(0), missed[:, h].mean(0), find_metric(torch.stack([k[n, h] for n in marks]))
        far = max((point - centre) @ metric @ (point - centre) for point in points)

        def compare(query, points=points, centre=centre, metric=metric / (WIDTH * far)):
            return torch.stack([query @ metric @ (point - centre) for point in points]).softmax(0)

        system = torch.stack([compare(point) for point in points]) + RIDGE * torch.eye(len(marks))
        weights = torch.linalg.solve(system, missed[:, h] - mean)
        carried.append(torch.stack([mean + compare(row) @ weights for row in q[:, h]]))
    return torch.stack(carried, 1)


def find_metric(keys: Tensor) -> Tensor:
    """What `landmarks.find_metric` makes of keys (m, d), eigenvalue by eigenvalue."""
    centre = keys.mean(0)
    covariance = sum(torch.outer(key - centre, key - centre) for key in keys)
    lengths, directions = torch.linalg.eigh(covariance / covariance.norm())
    roots = [sum(factor * length**power for power, factor in enumerate(ROOT)) for length in lengths]
    return directions @ torch.diag(torch.stack(roots)) @ directions.T


def list_keys(site: HybridSite, x: Tensor, emb: Tensor, plan: ContextPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of keys and of values (m, C) and log-weights (m,) in any order: attention does not depend on it."""
    chosen: list[int] = []
    keys, weights = [], []
    values: list[Tensor] = []
    if plan.chosen:
        scores = score_tokens(site, x, emb)
        chosen = sorted(range(len(x)), key=lambda n: -scores[n].item())[: plan.chosen]
        keys += [x[n] for n in chosen]
        values += [x[n] for n in chosen]
        weights += [scores[n] - scores[n].detach() for n in chosen]
    down, across = plan.strides
    for top in range(0, plan.height if down else 0, down or 1):
        for left in range(0, plan.width, across):
            members = [
                row * plan.width + column
                for row in range(top, min(top + down, plan.height))
                for column in range(left, min(left + across, plan.width))
            ]
            row, column = min(top + down // 2, plan.height - 1), min(left + across // 2, plan.width - 1)
            real, mean = x[row * plan.width + column], x[members].mean(0)
            lean = (x.new_zeros(()),) * 2 if site.blend is None else (site.blend.keys, site.blend.values)
            keys.append(real + lean[0] * (mean - real))
            values.append(real + lean[1] * (mean - real))
            weights.append(x.new_zeros(()))
    if site.memory is not None:
        memory = list_memory(site.memory, x)
        keys += memory
        values += memory
        weights += [x.new_zeros(())] * len(site.memory.tokens)
    return torch.stack(keys), torch.stack(values), torch.stack(weights)


def list_memory(memory: Memory, x: Tensor) -> list[Tensor]:
    """Memory tokens (C,), each with its own weighted mean of x (N, C)."""
    tokens = []
    for m, token in enumerate(memory.tokens):
        mass = (SHARPNESS * (x @ memory.questions[m]) / x.shape[-1] ** 0.5).exp()
        tokens.append(token + memory.gains[m] * (mass[:, None] * x).sum(0) / mass.sum())
    return tokens


def mix_neighbours(site: HybridSite, x: Tensor, emb: Tensor, plan: ContextPlan) -> Tensor:
    """The local branch (N, C), neighbour by neighbour; what lies outside the picture counts as zero."""
    local = site.local
    if local is None:
        raise ValueError("neighbours need a local branch, this site has none")
    silu = torch.nn.functional.silu
    low = local.down(x) * (1 + local.gate(silu(emb)))
    reach = local.mix.weight.shape[-1] // 2
    rows = []
    for n in range(len(x)):
        row, column = divmod(n, plan.width)
        total = local.mix.bias
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                if 0 <= row + i < plan.height and 0 <= column + j < plan.width:
                    neighbour = low[(row + i) * plan.width + column + j]
                    total = total + local.mix.weight[:, 0, i + reach, j + reach] * neighbour
        rows.append(local.up(silu(total)))
    return torch.stack(rows)


def score_tokens(site: HybridSite, x: Tensor, emb: Tensor) -> Tensor:
    """Router scores (N,): r_n = <x_n, LN(g(t))> / sqrt(C)."""
    router = site.router
    if router is None:
        raise ValueError("scores need a router, this site has none")
    gate = router.leave(torch.nn.functional.silu(router.enter(emb)))
    gate = (gate - gate.mean()) / (gate.var(unbiased=False) + 1e-5).sqrt()
    return x @ gate / len(gate) ** 0.5
