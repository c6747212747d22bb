"""Three settings with names, for whoever does not want to choose a number of keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

UNTRAINED_FROM = 0.25  # of the tokens: the second half of a sampling comes out nearer without trained parts


@dataclass(frozen=True)
class Stretch:
    """A part of a sampling, which lasts until the share `end` of the schedule: a share of the tokens become keys.

    There are at most `max_tokens` of them, from which on a layer's cost is linear, and `landmarks` queries or more see
    all keys; None are the student's own numbers. A stretch that is not `trained` runs without the trained parts.
    """

    token_budget: float | None
    max_tokens: int | None = None
    end: float = 1.0
    trained: bool = True
    landmarks: int | None = None

    def find_share(self, tokens: int) -> float:
        """The share of a layer's tokens that are keys, at most; raises ValueError where a student has its own."""
        if self.token_budget is None or self.max_tokens is None:
            raise ValueError(f"{self} leaves its number of keys to the student")
        return min(self.token_budget, self.max_tokens / tokens)

    @property
    def least_timestep(self) -> float:
        """Its last timestep, of 999 to 0."""
        return find_timestep(self.end)


OWN = Stretch(None)  # a student's own share of the tokens, in all steps


@dataclass(frozen=True)
class Preset:
    """The stretches of a sampling one after the other; behind the last one the model is left as it is.

    In the last steps it draws detail, where a short context errs most. As ComfyUI's `end_percent` an end counts
    timesteps: samplings whose steps crowd at the end, or that begin late, have more of them in the exact rest.
    """

    stretches: tuple[Stretch, ...]

    @property
    def end(self) -> float:
        """Where the exact rest begins, 1 for never."""
        return self.stretches[-1].end

    def find_stretch(self, timestep: float) -> int | None:
        """The number of the stretch that a timestep, 999 to 0, lies in; None for the exact rest."""
        return next((n for n, stretch in enumerate(self.stretches) if timestep >= stretch.least_timestep), None)

    def relate_sampling(self, steps: Sequence[float]) -> float:
        """Time of a sampling in even steps, as a share of the unpatched model's, from those of each stretch's step."""
        return mix_steps([stretch.end for stretch in self.stretches], [*steps, 1.0])


def find_timestep(end: float) -> float:
    """The timestep, of 999 to 0, at a share `end` of the schedule."""
    return 999 * (1 - end)


def mix_steps(ends: Sequence[float], steps: Sequence[float]) -> float:
    """The mean over even steps, those until each of `ends` and then the rest being as `steps` say."""
    shares = [after - before for before, after in pairwise([0.0, *ends, 1.0])]
    return sum(share * step for share, step in zip(shares, steps, strict=True))


NO_CAP = 1 << 30  # keys: a share of the tokens stays that share at every size


def rise(token_budget: float, max_tokens: int) -> Preset:
    """A preset whose second half has twice the keys: what the last steps get wrong no later one makes good."""
    second = Stretch(2 * token_budget, 2 * max_tokens, 0.95, trained=2 * token_budget < UNTRAINED_FROM)
    return Preset((Stretch(token_budget, max_tokens, 0.5), second))


# The caps are reached just above 512x512, at 4608 tokens of the finest level. With a share of the tokens the error
# halves when the sides double, with a number of keys it grows by two fifths (both measured without landmarks).
PRESETS = {
    "quality": rise(0.125, 576),
    "balanced": rise(0.0625, 288),
    "fast": rise(0.03125, 144),
}
