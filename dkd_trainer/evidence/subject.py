"""What is evaluated: the teacher as it is, the teacher a little disturbed, students, and their peers."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dha.presets import find_timestep

from ..diffusion import noise_levels
from ..host import Teacher

# `transformer_options` for a teacher and a side of the finest level in tokens: peers are stated as shares of it
Build = Callable[[Teacher, int], dict]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_nothing(_teacher: Teacher, _side: int) -> dict:
    """The teacher as it is."""
    return {}


@dataclass(frozen=True)
class Subject:
    """A named way to run a teacher's UNet.

    `family` groups the points of one line in the plot, where a point is marked with `label`; `identity` says what
    decides the result beside the name and the teacher; `attributes` are plain values of the UNet's modules to change by
    path, such as a norm's number of groups. Behind the share `end` of the sampling `then` goes on, or without one the
    teacher itself. The report shows how far pictures of the one that `is_shown` are from the teacher's.
    """

    name: str
    family: str
    build: Build = build_nothing
    label: str = ""
    identity: str = ""
    steps: int | None = None
    seed: int = 11
    dtype: torch.dtype | None = None
    attributes: Mapping[str, int] = field(default_factory=dict)
    is_dha: bool = False
    is_shown: bool = False
    end: float = 1.0
    then: "Subject | None" = None

    @property
    def key(self) -> dict[str, object]:
        """Everything about a subject that decides what is measured of it."""
        values = {"name": self.name, "identity": self.identity, "steps": self.steps, "seed": self.seed}
        later = {"then": self.then.key} if self.then else {}
        return values | {"dtype": str(self.dtype), "attributes": dict(self.attributes), "end": self.end} | later

    @property
    def is_teacher(self) -> bool:
        """Whether it predicts what the teacher predicts, to the bit."""
        return self.build is build_nothing and self.dtype is None and self.then is None


class Running:
    """A subject on a teacher: its patches are built, and the weights are copied where the subject's precision differs.

    Other subjects are computed in `precision` by autocast, as the trainer does.
    """

    def __init__(self, teacher: Teacher, subject: Subject, side: int, precision: str = "fp32"):
        self.subject, self.options = subject, subject.build(teacher, side)
        self.dtype = subject.dtype or torch.float32
        self.unet = teacher.unet if subject.dtype is None else copy.deepcopy(teacher.unet).to(subject.dtype)
        self.then = None if subject.then is None else Running(teacher, subject.then, side, precision)
        lower = precision != "fp32" and subject.dtype is None
        self.autocast = partial(torch.autocast, teacher.device.type, PRECISIONS[precision], enabled=lower)
        self.draw = 0

    def draw_anew(self, number: int) -> None:
        """Set what changes from step to step to another draw: ToMe's tokens, and where a student's grids stand."""
        torch.manual_seed(number)
        self.draw = number
        if self.then is not None:
            self.then.draw_anew(number)

    def predict(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The raw prediction (B, 4, h, w) in fp32 of noisy latents at timesteps t (B,) for context (B, 77, C)."""
        ours = t >= find_timestep(self.subject.end)
        if self.subject.end == 1 or ours.all():  # the first asks the device for nothing
            return self.run(latents, t, context)
        rest = partial(self.run, changed=False) if self.then is None else self.then.predict
        if not ours.any():
            return rest(latents, t, context)
        return torch.where(ours.view(-1, 1, 1, 1), self.run(latents, t, context), rest(latents, t, context))

    def run(self, latents: Tensor, t: Tensor, context: Tensor, changed: bool = True) -> Tensor:
        """A forward as the subject changes it, or as the teacher's own."""
        options, attributes = (self.options, self.subject.attributes) if changed else ({}, {})
        options = {"sigmas": noise_levels(t) * (1 + self.draw), **options}  # what a student's grids are moved by
        inputs = {"context": context.to(self.dtype), "transformer_options": options}
        with changed_attributes(self.unet, attributes), self.autocast():
            return self.unet(latents.to(self.dtype), t.float(), **inputs).float()


@contextmanager
def changed_attributes(module: nn.Module, values: Mapping[str, int]) -> Iterator[None]:
    """Set plain attributes of submodules by path, and set them back in the end."""
    places = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in values]
    before = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), value in zip(places, values.values(), strict=True):
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def list_null_band(steps: int, device: torch.device) -> list[Subject]:
    """Changes of the teacher that nobody minds, and as the far end another seed.

    fp16, which is nearer than bf16, is left out on a processor, where it takes ten times as long.
    """
    half = [] if device.type == "cpu" else [Subject("teacher, fp16", "null", dtype=torch.float16)]
    return [
        *half,
        Subject("teacher, bf16", "null", dtype=torch.bfloat16),
        Subject(f"teacher, {steps * 4 // 5} steps", "null", steps=steps * 4 // 5),
        Subject("teacher, another seed", "far end", seed=12),
    ]
