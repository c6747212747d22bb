"""How a student does while it is trained: errors on pairs it never sees, pictures beside its teacher's."""

import io
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
    """Fixed pairs with fixed noise: the same numbers every time a student is looked at."""

    def __init__(self, teacher: Teacher, corpus: Corpus, picks: list[int], watch: WatchSettings):
        self.teacher, self.watch = teacher, watch
        self.latents, self.context = corpus.read(picks)
        self.empty = corpus.empty.float()
        self.noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(11))
        self.drawn: list[Tensor] = []

    def list_views(self, student: Student, count: int) -> list[tuple[dict, dict]]:
        """`transformer_options` of teacher and student for the first `count` pairs, by ways to compare them."""
        return [({}, student_options(student))]

    @torch.no_grad()
    def measure_errors(self, student: Student) -> dict[str, float]:
        """Relative error |e_s - e_t| / |e_t| of the prediction, per band of timesteps and as their `mean`.

        It is what the errors on two grids have in common: the rest mostly cancels over a sampling.
        """
        generator, views = torch.Generator().manual_seed(5), self.list_views(student, len(self.latents))
        errors = {}
        for low, high in TIME_BANDS:
            t = torch.randint(low, high, (len(self.latents),), generator=generator)
            noisy = add_noise(self.latents, self.noise, t)
            moved = [tensor.to(self.teacher.device) for tensor in (noisy, t, self.context)]
            errors[f"{low}-{high}"] = sum(self.compare(moved, *view) for view in views) / len(views)
        return {**errors, "mean": sum(errors.values()) / len(TIME_BANDS)}

    def compare(self, inputs: list[Tensor], taught: dict, options: dict) -> float:
        """`measure_errors` of one set of inputs: noisy latents, timesteps and contexts."""
        target, levels = self.teacher.predict(*inputs, taught), noise_levels(inputs[1])
        grids = ({**options, "sigmas": levels * factor} for factor in (1, 2))
        first, second = (self.teacher.predict(*inputs, grid) - target for grid in grids)
        return ((first * second).sum().clamp(min=0).sqrt() / target.norm()).item()

    def draw_sheet(self, student: Student) -> Tensor:
        """Rows of teacher, student and four times their difference, same prompts and noise, as a picture (3, H, W)."""
        views = self.list_views(student, self.watch.pictures)
        self.drawn = self.drawn or [self.draw(teacher) for teacher, _ in views]
        rows = []
        for drawn, (_, options) in zip(self.drawn, views, strict=True):
            pictures = self.draw(options)
            rows += [drawn, pictures, ((pictures - drawn).abs() * GAIN).clamp(max=1)]
        return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)

    @torch.no_grad()
    def draw(self, options: dict) -> Tensor:
        """Pictures (n, 3, H, W) of the first prompts."""
        count, device = self.watch.pictures, self.teacher.device
        context = self.context[:count]
        both = torch.cat([context, self.empty.expand_as(context)]).to(device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            doubled, times = torch.cat([x, x]), torch.cat([t, t])
            prediction = self.teacher.predict(doubled, times.to(device), both, options)
            prompted, empty = to_noise(prediction, doubled, times, self.teacher.prediction).chunk(2)
            return empty + self.watch.guidance * (prompted - empty)

        return self.teacher.decode_latents(sample_euler(predict, self.noise[:count].to(device), STEPS)).cpu().clone()


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1] as PNG, whole or not at all."""
    array = (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    content = io.BytesIO()
    Image.fromarray(array).save(content, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
