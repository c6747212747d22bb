"""The hybrid context: queries stay whole, keys and values shrink to grid, chosen and memory tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import DHAConfig
from .landmarks import carry_missed
from .local import LocalMix
from .memory import Memory
from .places import Places, find_places
from .routing import ContextPlan, Router, cell_means


class LowRank(nn.Module):
    """x with a trained correction, x + up(down(x)) of rank r, which starts as zero."""

    def __init__(self, channels: int, rank: int, operations=nn):
        super().__init__()
        self.down = operations.Linear(channels, rank, bias=False)
        self.up = operations.Linear(rank, channels, bias=False)

    def start(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C); the sum is made where the product is written, which spares a pass over x."""
        low = self.down(x)
        wide = torch.addmm(x.flatten(0, -2).to(low.dtype), low.flatten(0, -2), self.up.weight.to(low).t())
        return wide.view(x.shape)


class Blend(nn.Module):
    """How far grid tokens lean towards the mean of their cell, by channel, as keys and as values; starts as not at all.

    Real tokens are better than averages before any training; how much of which is best is cheap to learn.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.keys = nn.Parameter(torch.empty(channels))
        self.values = nn.Parameter(torch.empty(channels))

    def start(self) -> None:
        nn.init.zeros_(self.keys)
        nn.init.zeros_(self.values)

    def forward(self, grid: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """Grid tokens and their cells' means (B, coarse, C) -> keys and values (B, coarse, C)."""
        way = means - grid
        return torch.addcmul(grid, way, self.keys.to(grid)), torch.addcmul(grid, way, self.values.to(grid))


class Mixing(NamedTuple):
    """How queries see a context once it is projected: `log_weights` (B, m) are added to its logits.

    They are zeros that carry the router's gradient, and None where none is asked for. With landmarks, the queries of
    numbers `marks` (L,), what is projected are all N `tokens` with the made-up ones behind them; the short context are
    the `picks` (chosen, grid) of the former and all of the latter.
    """

    log_weights: Tensor | None = None
    marks: Tensor | None = None
    tokens: int = 0
    picks: tuple[Tensor | None, Tensor | None] = (None, None)

    def run(self, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict, further=()) -> list[Tensor]:
        """Attention of q (B, N, C) to projected keys and values (B, any, C); `attend` is as in `dha.patch`.

        One output for its own grid, and with landmarks one for each of the `further` grids (coarse,) too.
        """
        mask = None if self.log_weights is None else self.log_weights[:, None, None].to(q.dtype)
        if self.marks is None:
            return [attend(q, k, v, options, mask)]
        (k, made_k), (v, made_v) = (x.tensor_split([self.tokens], dim=1) for x in (k, v))
        picks = [self.picks, *((self.picks[0], grid) for grid in further)]
        nears = [attend(q, pick_short(k, made_k, *p), pick_short(v, made_v, *p), options, mask) for p in picks]
        attend = partial(attend, options=options, mask=None)
        return carry_missed(attend, q, k, v, nears, self.marks, options["n_heads"])


class Context(NamedTuple):
    """Tokens before projection to keys and to values, and how they are looked at once they are projected.

    There are (B, m, C) of them, with landmarks N and the made-up ones, as `Mixing` says. `chosen` are the numbers
    (B, k) of the tokens that the router picked, None without a router.
    """

    keys: Tensor
    values: Tensor
    mixing: Mixing
    chosen: Tensor | None


class HybridSite(nn.Module):
    """The trained parts of one self-attention; any of them may be absent, all of them in the training-free student."""

    def __init__(self, channels: int, embedding: int, config: DHAConfig, operations=nn):
        super().__init__()
        self.router = Router(embedding, channels, config.router_width, operations) if config.router_width else None
        self.memory = Memory(channels, config.memory) if config.memory else None
        self.local = LocalMix(channels, embedding, config.local, operations) if config.local else None
        self.blend = Blend(channels) if config.blend else None
        names = config.deltas if config.rank else ()
        self.deltas = nn.ModuleDict({name: LowRank(channels, config.rank, operations) for name in names})

    def start(self) -> None:
        """Initialise so that the output is near the training-free student's: only router and memory are felt."""
        for part in (self.memory, self.local, self.blend, *self.deltas.values()):
            if part is not None:
                part.start()
        if self.router is not None:
            for layer in (self.router.enter, self.router.leave):
                nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
                nn.init.zeros_(layer.bias)

    def correct(self, name: str, x: Tensor) -> Tensor:
        """x plus its low-rank correction for q, k, v or out; x itself where there is none."""
        return self.deltas[name](x) if name in self.deltas else x

    def build_context(self, x: Tensor, emb: Tensor, plan: ContextPlan, places: Places | None = None) -> Context:
        """Keys for tokens x (B, N, C) of a `plan.height` x `plan.width` picture at time embedding emb (B, E).

        Without `places` the grid stands in the middle. Raises ValueError when a plan needs a router and there is none.
        """
        scores = chosen = None
        if plan.chosen:
            if self.router is None:
                raise ValueError(f"the plan chooses {plan.chosen} tokens, but this site has no router")
            scores = self.router(x, emb)
            chosen = scores.topk(plan.chosen, dim=1, sorted=False).indices
        grid, marks = find_places(plan, None, x.device) if places is None else places
        picks = chosen, grid if self.blend is None else None
        tokens = x if plan.landmarks else take_tokens(x, *picks)
        keys, values = self.append_made(tokens, x, plan, grid)
        short = plan.chosen + plan.coarse + (0 if self.memory is None else len(self.memory.tokens))
        return Context(keys, values, Mixing(self.weigh(scores, chosen, short), marks, plan.tokens, picks), chosen)

    def append_made(self, tokens: Tensor, x: Tensor, plan: ContextPlan, grid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of `tokens` (B, any, C) and of what is made of x (B, N, C): blended grid, memory."""
        pairs = [(tokens, tokens)]
        if self.blend is not None and plan.coarse:
            pairs.append(self.blend(take_tokens(x, None, grid), cell_means(x, plan)))
        if self.memory is not None:
            pairs.append((self.memory(x),) * 2)
        if len(pairs) == 1:
            return tokens, tokens
        keys, values = zip(*pairs, strict=True)
        joined = torch.cat(keys, dim=1)
        return joined, joined if self.blend is None else torch.cat(values, dim=1)

    @staticmethod
    def weigh(scores: Tensor | None, chosen: Tensor | None, count: int) -> Tensor | None:
        """`Mixing.log_weights` of `count` keys, the first of which are those that the router chose by its scores."""
        if scores is None or chosen is None or not torch.is_grad_enabled():
            return None
        return F.pad(straight_through(scores.gather(1, chosen)), (0, count - chosen.shape[1]))

    def forward(
        self,
        attention: nn.Module,
        attend: Callable,
        x: Tensor,
        emb: Tensor,
        plan: ContextPlan,
        heads: int,
        places: Places | None = None,
    ) -> Tensor:
        """One layer alone: x (B, N, C) through `attention`'s own to_q, to_k, to_v and to_out, with a short context.

        `attend(q, k, v, options, mask)` is as in `dha.patch`, `places` as in `build_context`.
        """
        places = find_places(plan, None, x.device) if places is None else places
        return self.run_places(attention, attend, x, emb, plan, heads, [places])[0]

    def run_places(
        self,
        attention: nn.Module,
        attend: Callable,
        x: Tensor,
        emb: Tensor,
        plan: ContextPlan,
        heads: int,
        places: Sequence[Places],
    ) -> list[Tensor]:
        """`forward` at each of several places; what is the same at all of them is computed once."""
        q = attention.to_q(self.correct("q", x))
        alike = plan.landmarks and self.blend is None  # all tokens are projected, wherever the grid stands
        mixed = []
        for first, *others in [places] if alike else [[place] for place in places]:
            keys, values, mixing, _ = self.build_context(x, emb, plan, first)
            k, v = attention.to_k(self.correct("k", keys)), attention.to_v(self.correct("v", values))
            mixed += mixing.run(attend, q, k, v, {"n_heads": heads}, [place.grid for place in others])
        outputs = [self.correct("out", attention.to_out(each)) for each in mixed]
        if self.local is None:
            return outputs
        local = self.local(x, emb, plan.height, plan.width)
        return [output + local for output in outputs]


def pick_short(x: Tensor, made: Tensor, chosen: Tensor | None, grid: Tensor | None) -> Tensor:
    """The short context (B, m, C) of projected tokens x (B, N, C), as `take_tokens`, and `made` ones (B, any, C)."""
    picked = take_tokens(x, chosen, grid)
    return torch.cat([picked, made], dim=1) if made.shape[1] else picked


def take_tokens(x: Tensor, chosen: Tensor | None, grid: Tensor | None) -> Tensor:
    """Tokens (B, k + coarse, C) of x (B, N, C) by number, chosen (B, k) and grid (coarse,); None are none.

    Whole rows are copied once: `gather` would read an index for every channel.
    """
    if chosen is None:
        return x[:, :0] if grid is None else x.index_select(1, grid)
    batch, count, channels = x.shape
    picks = chosen if grid is None else torch.cat([chosen, grid.expand(batch, -1)], dim=1)
    if batch > 1:
        picks = picks + torch.arange(0, batch * count, count, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, picks.flatten()).view(batch, -1, channels)


def straight_through(scores: Tensor) -> Tensor:
    """Zero in value, the scores in gradient: a token that deserves more attention than it gets raises its score."""
    return scores - scores.detach()
