"""How a student does while it is trained: errors on pairs it never sees, pictures beside its teacher's."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dha.student import Student
from dha.whole_file import write_whole

from ..data.batches import Corpus
from ..diffusion import TIME_BANDS, add_noise, noise_levels, sample_euler, to_noise
from ..host import Teacher
from ..settings import WatchSettings
from .imitation import student_options

STEPS = 25
GAIN = 4  # the difference is shown this many times larger


def set_aside(corpus: Corpus, count: int, seed: int) -> list[int]:
    """Samples of the largest bucket that training leaves out: `count`, at most an eighth of it, drawn by the seed."""
    members = max(corpus.buckets.values(), key=len)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    return sorted(members[i] for i in order[: min(count, len(members) // 8)])


class Examination:
    """Fixed pairs with fixed noise: the same numbers every time a student is looked at.

    The UNet is given at most `batch` pictures at a time, two at least, as a step of the training gives it.
    """

    def __init__(self, teacher: Teacher, corpus: Corpus, picks: list[int], watch: WatchSettings, batch: int):
        self.teacher, self.watch, self.batch = teacher, watch, batch
        self.latents, self.context = corpus.read(picks)
        self.empty = corpus.empty.float()
        self.noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(11))
        self.drawn: list[Tensor] = []

    def list_views(self, student: Student, part: slice) -> list[tuple[dict, dict]]:
        """`transformer_options` of teacher and student for a part of the pairs, by ways to compare them."""
        return [({}, student_options(student))]

    @torch.no_grad()
    def measure_errors(self, student: Student) -> dict[str, float]:
        """Relative error |e_s - e_t| / |e_t| of the prediction, per band of timesteps and as their `mean`.

        It is what the errors on two grids have in common: the rest mostly cancels over a sampling.
        """
        products, powers = self.sum_parts(student).unbind(-1)
        errors = name_bands((products.clamp(min=0) / powers).sqrt().mean(1))
        return {**errors, "mean": sum(errors.values()) / len(errors)}

    def sum_parts(self, student: Student) -> Tensor:
        """`compare` of all parts, added up; the timesteps are the same every time."""
        generator, shape = torch.Generator().manual_seed(5), (len(self.latents),)
        times = [torch.randint(low, high, shape, generator=generator) for low, high in TIME_BANDS]
        return sum(self.compare(student, part, times) for part in list_parts(len(self.latents), self.batch))

    def compare(self, student: Student, part: slice, times: list[Tensor]) -> Tensor:
        """Sums (bands, views, 2) over a part: of the errors on two grids multiplied, and of the target squared.

        The grids are those of all pairs' timesteps, so that what is found does not depend on the parts.
        """
        views, sums = self.list_views(student, part), []
        for t in times:
            inputs, levels = self.add_noise(part, t), noise_levels(t).to(self.teacher.device)
            for taught, options in views:
                target = self.teacher.predict(*inputs, taught)
                grids = ({**options, "sigmas": levels * factor} for factor in (1, 2))
                first, second = (self.teacher.predict(*inputs, grid) - target for grid in grids)
                sums.append(torch.stack([(first * second).sum(), target.square().sum()]))
        return torch.stack(sums).unflatten(0, (len(times), -1))

    def add_noise(self, part: slice, t: Tensor) -> list[Tensor]:
        """What the UNet is given of a part at all pairs' timesteps t (n,): noisy latents, timesteps and contexts."""
        noisy = add_noise(self.latents[part], self.noise[part], t[part])
        return [tensor.to(self.teacher.device) for tensor in (noisy, t[part], self.context[part])]

    def draw_sheet(self, student: Student) -> Tensor:
        """Rows of teacher, student and four times their difference, same prompts and noise, as a picture (3, H, W)."""
        parts = self.list_pictures()
        views = list(zip(*(self.list_views(student, part) for part in parts), strict=True))
        self.drawn = self.drawn or [self.draw(parts, [taught for taught, _ in view]) for view in views]
        rows = []
        for drawn, view in zip(self.drawn, views, strict=True):
            pictures = self.draw(parts, [options for _, options in view])
            rows += [drawn, pictures, ((pictures - drawn).abs() * GAIN).clamp(max=1)]
        return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)

    def list_pictures(self) -> list[slice]:
        """The parts of the first prompts, of which a sheet is; each is drawn with its prompts and without."""
        return list_parts(min(self.watch.pictures, len(self.latents)), max(1, self.batch // 2))

    def draw(self, parts: Sequence[slice], options: Sequence[dict]) -> Tensor:
        """Pictures (n, 3, H, W) of all parts, each with options of its own; decoded together, as the VAE finds room."""
        latents = [self.draw_part(part, own) for part, own in zip(parts, options, strict=True)]
        return self.teacher.decode_latents(torch.cat(latents)).cpu().clone()

    @torch.no_grad()
    def draw_part(self, part: slice, options: dict) -> Tensor:
        """Latents (n, 4, h, w) of a part of the prompts, drawn."""
        device, context = self.teacher.device, self.context[part]
        both = torch.cat([context, self.empty.expand_as(context)]).to(device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            doubled, times = torch.cat([x, x]), torch.cat([t, t])
            prediction = self.teacher.predict(doubled, times.to(device), both, options)
            prompted, empty = to_noise(prediction, doubled, times, self.teacher.prediction).chunk(2)
            return empty + self.watch.guidance * (prompted - empty)

        return sample_euler(predict, self.noise[part].to(device), STEPS)


def name_bands(values: Tensor) -> dict[str, float]:
    """One value (bands,) for each band of timesteps, by the band's name."""
    return {f"{low}-{high}": value for (low, high), value in zip(TIME_BANDS, values.tolist(), strict=True)}


def list_parts(count: int, most: int) -> list[slice]:
    """Parts of `count` things one after the other, of at most so many each."""
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1] as PNG, whole or not at all."""
    array = (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    content = io.BytesIO()
    Image.fromarray(array).save(content, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
