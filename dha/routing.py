"""Which tokens become keys: a coarse grid of real tokens plus those that the router scores highest."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .landmarks import count_landmarks


@dataclass(frozen=True)
class ContextPlan:
    """Keys of one level: a grid with one token per cell of `strides` (down, across) tokens, and `chosen` others.

    Strides of 0 mean no grid. So many of the queries are `landmarks`.
    """

    height: int
    width: int
    strides: tuple[int, int]
    chosen: int
    landmarks: int = 0

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Cells down and across, the last ones cut by the border."""
        if not all(self.strides):
            return 0, 0
        return math.ceil(self.height / self.strides[0]), math.ceil(self.width / self.strides[1])

    @property
    def coarse(self) -> int:
        return self.grid[0] * self.grid[1]


def plan_context(
    height: int, width: int, budget: float, coarse_share: float, max_tokens: int, routed: bool, landmarks: int = 0
) -> ContextPlan:
    """Spend a key budget: the grid of the most tokens within its share, the rest of the keys go to the router.

    `budget` is a share of the tokens, capped at `max_tokens` keys. Without a router (`routed` false) the grid gets all.
    Of landmarks there are `landmarks` or more, as `count_landmarks` says.
    """
    height, width = specialise(height), specialise(width)
    tokens = height * width
    keys = specialise(max(1, min(round(budget * tokens), max_tokens, tokens)))
    marks = count_landmarks(landmarks, keys, tokens)
    allowance = keys * coarse_share if routed else keys
    if allowance < 1:
        return ContextPlan(height, width, (0, 0), keys, marks)
    plan = ContextPlan(height, width, choose_strides(height, width, int(allowance)), 0, marks)
    return replace(plan, chosen=keys - plan.coarse) if routed else plan


def specialise(number: int) -> int:
    """The same number; to torch.compile a constant, where numbers that have changed before are symbols.

    No plan can be made of symbols, so that each size and each number of keys has a graph of its own.
    """
    return len(range(number))


def choose_strides(height: int, width: int, most: int) -> tuple[int, int]:
    """Cells, down and across, of which as many as can be and at most `most` make up height x width tokens.

    They are no more than twice as long as wide, where any such fit; of equally many the squarer ones.
    """
    area = height * width / most
    likely = range(max(1, int((area / 2) ** 0.5)), min(height, int((2 * area) ** 0.5) + 2) + 1)
    # All of them only for strips: compiled code unrolls this loop.
    found = list_cells(height, width, most, likely) or list_cells(height, width, most, range(1, height + 1))
    return min(found)[-2:]


def list_cells(height: int, width: int, most: int, downs: range) -> list[tuple[bool, int, float, int, int]]:
    """For each height of a cell the narrowest that fits: whether it is long, minus the count, length, down, across."""
    found = []
    for down in downs:
        rows = math.ceil(height / down)
        if columns := most // rows:
            across = min(max(math.ceil(width / columns), math.ceil(down / 2)), width)
            length = max(down, across) / min(down, across)
            found.append((length > 2, -rows * math.ceil(width / across), length, down, across))
    return found


def coarse_indices(plan: ContextPlan, device: torch.device) -> Tensor:
    """Token numbers (coarse,) of the grid: the middle of each cell, clipped to the picture."""
    rows, columns = (
        (torch.arange(cells, device=device) * stride + stride // 2).clamp(max=size - 1)
        for cells, stride, size in zip(plan.grid, plan.strides, (plan.height, plan.width), strict=True)
    )
    return (rows[:, None] * plan.width + columns).flatten()


def cell_means(x: Tensor, plan: ContextPlan) -> Tensor:
    """Mean of the tokens x (B, N, C) in each grid cell, (B, coarse, C); cells cut by the border have fewer."""
    return F.avg_pool2d(to_picture(x, plan.height, plan.width), plan.strides, ceil_mode=True).flatten(2).transpose(1, 2)


def to_picture(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens x (B, height*width, C) as a picture (B, C, height, width), nothing copied.

    In this order: where the channels are moved before the rows are cut, a single picture's strides do not say "channels
    last" to PyTorch, and it takes kernels that are up to fifty times slower.
    """
    return x.unflatten(1, (height, width)).movedim(-1, 1)


class Router(nn.Module):
    """Token scores that follow content and timestep: r_n = <x_n, LN(g(t))> / sqrt(C), g a two-layer perceptron."""

    def __init__(self, embedding: int, channels: int, width: int, operations=nn):
        super().__init__()
        self.enter = operations.Linear(embedding, width)
        self.leave = operations.Linear(width, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Scores (B, N) of tokens x (B, N, C) at time embedding emb (B, E)."""
        gate = self.leave(F.silu(self.enter(emb)))
        gate = F.layer_norm(gate.float(), gate.shape[-1:]) * x.shape[-1] ** -0.5
        return torch.bmm(x, gate.to(x.dtype)[..., None])[..., 0]
