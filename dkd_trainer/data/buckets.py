"""Aspect-ratio buckets: the few shapes that pictures are cut to, so that a batch shares one."""

import math
from dataclasses import dataclass
from functools import cached_property

from .source import TOO_SMALL, DataError, Refused


@dataclass(frozen=True)
class Framing:
    """The shapes of a data set, in pixels; all else being left alone, squares of `size`.

    With `max_ratio` above 1, sides are multiples of `step`, the area is about `size` squared and the longer side at
    most `max_ratio` times the shorter. Pictures with a side shorter than `min_side` (default: half of `size`) are
    refused rather than blown up.
    """

    size: int
    step: int = 64
    max_ratio: float = 1.0
    min_side: int | None = None

    def __post_init__(self):
        if self.size < 8 or self.size % 8:
            raise DataError(f"size is {self.size}, expected a multiple of 8 pixels")
        if self.step < 8 or self.step % 8:
            raise DataError(f"bucket step is {self.step}, expected a multiple of 8 pixels (64 suits SD-2.x)")
        if not 1 <= self.max_ratio <= 8:
            raise DataError(f"the largest side ratio is {self.max_ratio}, expected 1 (squares only) to 8")

    @property
    def smallest(self) -> int:
        return self.size // 2 if self.min_side is None else self.min_side

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(width, height) of every bucket, the square first."""
        found = {(self.size, self.size)}
        for long in range(self.step, int(self.size * self.max_ratio) + 1, self.step):
            short = round(self.size**2 / long / self.step) * self.step
            if short < long <= self.max_ratio * short:
                found |= {(long, short), (short, long)}
        return sorted(found, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))

    def choose_shape(self, width: int, height: int) -> tuple[int, int]:
        """The bucket nearest to a picture's side ratio; raises Refused for a picture that is too small."""
        if min(width, height) < max(1, self.smallest):
            raise Refused(TOO_SMALL, f"{width}x{height} pixels, expected {self.smallest} or more a side")
        ratio = math.log(width / height)
        return min(self.shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - ratio))
