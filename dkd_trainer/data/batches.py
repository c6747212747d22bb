"""What one training step sees: it depends on the seed, the step and the sample's place in the batch alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dha.presets import Stretch
from dha.student import Student

from ..diffusion import add_noise, shift_timesteps
from ..host import Teacher
from ..settings import Settings
from .buckets import Framing
from .corpus import encode_listing
from .drawing import Drawing
from .encoder import Effort
from .pairs import list_source
from .source import Listing


class Corpus(Protocol):
    """Encoded pairs: `buckets` names the samples of each latent size (h, w), `empty` (1, 77, C) is the empty prompt.

    `identity` is the same for the same pairs in the same order, wherever they lie.
    """

    identity: str
    empty: Tensor
    buckets: dict[tuple[int, int], list[int]]

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, h, w) and contexts (B, 77, C), fp32, of samples of one bucket."""


def open_pairs(source: str, teacher: Teacher, settings: Settings, quiet: bool = False, limit: int | None = None):
    """The `corpus.Corpus` of a source with a run's settings, its first `limit` pairs; raises DataError."""
    return encode_pairs(list_source(source, limit), teacher, settings, quiet)


def encode_pairs(listing: Listing, teacher: Teacher, settings: Settings, quiet: bool = False):
    """The same of pairs that are listed already; what they were encoded with leaves the GPU."""
    data = settings.data
    framing = Framing(data.size, data.bucket_step, data.max_ratio, data.min_side or None)
    drawing = Drawing(data.draw_steps, data.draw_guidance, data.draw_seed, settings.train.precision)
    corpus = encode_listing(listing, teacher, settings.cache, framing, drawing, Effort(quiet=quiet))
    teacher.release()
    return corpus


def open_sources(teacher: Teacher, settings: Settings, quiet: bool = False):
    """The corpora of a run: what it learns from, and the held-out one or None; raises DataError."""
    data = settings.data
    corpus = open_pairs(data.path, teacher, settings, quiet, data.limit or None)
    return corpus, open_pairs(data.held_out, teacher, settings, quiet) if data.held_out else None


@dataclass(frozen=True)
class Draw:
    """A step's choices for the whole batch: samples, timesteps t (B,), which prompts are dropped, key budget."""

    step: int
    picks: list[int]
    t: Tensor
    dropped: Tensor
    guidance: Tensor
    budget: float


@dataclass(frozen=True)
class Batch:
    """A part of a step on its device: noisy latents at t (B,) with context (B, 77, C), and what was mixed in."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    context: Tensor
    empty: Tensor
    guidance: Tensor
    budget: float
    seed: int

    def __len__(self) -> int:
        return len(self.noisy)


class Sampler:
    """Draws steps from a corpus; `excluded` samples are left for validation. Without a student there is no key budget.

    Raises ValueError when the budget replaces nothing at one of the corpus's sizes.
    """

    def __init__(self, corpus: Corpus, settings: Settings, student: Student | None, excluded: Sequence[int] = ()):
        self.corpus, self.settings, kept_out = corpus, settings, set(excluded)
        buckets = {size: [i for i in members if i not in kept_out] for size, members in corpus.buckets.items()}
        self.buckets = {size: members for size, members in sorted(buckets.items()) if members}
        factors = settings.train.budgets
        self.budgets = {size: list_budgets(student, *size, factors) if student else [1.0] for size in self.buckets}
        counts = [len(members) for members in self.buckets.values()]
        self.ends = torch.tensor(counts).cumsum(0)

    def draw(self, step: int, guidance: tuple[float, ...] = ()) -> Draw:
        """The choices of a step, the same on every process; the batch comes from one bucket, drawn by its size."""
        train = self.settings.train
        generator = seeded(train.seed, step, 0)
        place = torch.randint(int(self.ends[-1]), (), generator=generator)
        size = list(self.buckets)[int((place >= self.ends).sum())]
        members, budgets = self.buckets[size], self.budgets[size]
        picks = torch.randint(len(members), (train.batch,), generator=generator)
        t = shift_timesteps(torch.randint(0, 1000, (train.batch,), generator=generator), train.timestep_shift)
        dropped = torch.rand(train.batch, generator=generator) < train.empty_prompts
        budget = budgets[int(torch.randint(len(budgets), (), generator=generator))]
        low, high = guidance or (1.0, 1.0)
        scales = low + (high - low) * torch.rand(train.batch, generator=generator)
        return Draw(step, [members[i] for i in picks.tolist()], t, dropped, scales, budget)

    def read(self, draw: Draw, part: slice, device: torch.device) -> Batch:
        """The samples of `part` with their noise, on the device."""
        latents, context = self.corpus.read(draw.picks[part])
        context[draw.dropped[part]] = self.corpus.empty.float()
        seed, places = self.settings.train.seed, range(len(draw.picks))[part]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=seeded(seed, draw.step, i + 1)) for i in places])
        t = draw.t[part]
        tensors = (latents, noise, add_noise(latents, noise, t), t, context, self.corpus.empty.float())
        moved = [tensor.to(device) for tensor in (*tensors, draw.guidance[part])]
        return Batch(*moved, budget=draw.budget, seed=(seed * 1_000_003 + draw.step) % 2**62)


def seeded(seed: int, step: int, place: int) -> torch.Generator:
    """A generator for one sample of one step."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 65_537 + place) % 2**63)


def list_budgets(student: Student, height: int, width: int, factors: Sequence[float]) -> list[float]:
    """Key budgets to draw from, so that one student serves a range; those that would replace nothing are left out.

    Mode `official` has none, its sparsity is fixed. Raises ValueError when even the configured budget replaces nothing.
    """
    config = student.config
    if config.mode == "official":
        return [config.token_budget]
    if not replaces_any(student, height, width, config.token_budget):
        raise ValueError(
            f"student.token_budget {config.token_budget:g} replaces nothing at a latent of {height}x{width} on levels "
            f"{list(config.levels)}; give a smaller budget or finer levels"
        )
    budgets = [min(1.0, config.token_budget * factor) for factor in factors]
    usable = [budget for budget in budgets if replaces_any(student, height, width, budget)]
    return usable or [config.token_budget]


def replaces_any(student: Student, height: int, width: int, budget: float) -> bool:
    """Whether some level gets fewer keys than it has tokens."""
    plans = (student.plan(-(-height >> level), -(-width >> level), Stretch(budget)) for level in student.config.levels)
    return any(plan.coarse + plan.chosen < plan.tokens for plan in plans)
