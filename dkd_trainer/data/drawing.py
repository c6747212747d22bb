"""Latents for prompts alone, drawn by the teacher itself."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import sample_euler, to_noise
from .cache import Reader, make_key
from .frames import check_finite, split
from .source import DataError, Refused


@dataclass(frozen=True)
class Drawing:
    """How the teacher draws: Euler steps, scale of the guidance, the seed that the noise depends on, fp32 or bf16."""

    steps: int = 25
    cfg: float = 7.5
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self):
        if self.steps < 1 or self.cfg < 0:
            raise DataError(
                f"drawing takes {self.steps} steps at cfg {self.cfg}; expected 1 or more, and cfg 0 or more"
            )

    def list_values(self) -> list[float | str]:
        """What a latent depends on beside its prompt and noise."""
        return [self.steps, self.cfg, *([self.precision] if self.precision != "fp32" else [])]


@dataclass(frozen=True, slots=True)
class Sketch:
    """A latent to draw: where its prompt's context is kept, and the seed of its noise."""

    place: tuple[int, int]
    seed: int


def plan_seeds(prompts: list[str], seed: int) -> list[int]:
    """A noise seed for every prompt, apart from its place in the list; a prompt given twice is drawn twice."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(int.from_bytes(make_key("noise", prompt, seed, seen[prompt])[:7], "big"))
        seen[prompt] += 1
    return seeds


@torch.no_grad()
def draw_latents(
    teacher, sketches: list[Sketch], contexts: Reader, empty: Tensor, size: int, drawing: Drawing, batch: int
) -> Iterator[Tensor | Refused]:
    """Latents (4, size / 8, size / 8) in half precision, one a sketch; `empty` (1, 77, C) is the empty prompt's."""
    for part in split(sketches, batch):
        context = contexts.read([sketch.place for sketch in part])
        noise = torch.stack([draw_noise(sketch.seed, size // 8) for sketch in part]).to(teacher.device)
        both = torch.cat([context, empty.expand_as(context)]).to(teacher.device)

        def predict(x: Tensor, t: Tensor, both: Tensor = both) -> Tensor:
            doubled, times = torch.cat([x, x]), torch.cat([t, t])
            with torch.autocast(x.device.type, torch.bfloat16, enabled=drawing.precision == "bf16"):
                prediction = teacher.predict(doubled, times.to(x.device), both)
            cond, uncond = to_noise(prediction, doubled, times, teacher.prediction).chunk(2)
            return uncond + drawing.cfg * (cond - uncond)

        yield from (check_finite(latent) for latent in sample_euler(predict, noise, drawing.steps).cpu().half())


def draw_noise(seed: int, side: int) -> Tensor:
    """Gaussian noise (4, side, side) that depends on the seed alone, not on the device or the batch."""
    return torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed))
