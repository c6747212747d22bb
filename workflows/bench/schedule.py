"""What a run of the bench measures, in the order of importance, and how its time is shared out."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .contest import Entrant
from .layer import Layer, enter_layers, enter_parts
from .model import DTYPES, build_decoder
from .step import Size, enter_pictures, enter_steps
from .subjects import Subject, compile_subject, is_wanted, switch_backend

PARTS = ("step", "layers", "profile", "pictures", "backends", "compile")
SIZES = {
    "cpu": (Size(512, 512), Size(768, 768), Size(1024, 1024)),
    "cuda": tuple(Size(*s) for s in ((512, 512), (768, 768), (1024, 1024), (1216, 832), (1536, 1536), (2048, 2048))),
    "mini": (Size(512, 256),),  # HyperTile cuts nothing below 512
}
LAYER_SIDES = (384, 512, 768, 1024, 1536, 2048, 3072, 4096)
PROFILE_SIDES = (512, 768, 1024)
LAYER_LEVELS = (0, 1, 2)
FEW = ("dha", "student", "ceiling")  # beside the unpatched model, with kernels that need a setup of their own
COMPILED = ("dha-balanced", "student-balanced", "ceiling")
COMPILED_SIZES = 2
COMPILING_WEIGHT = 150.0  # four compilations of the UNet


@dataclass(frozen=True)
class Task:
    """One contest: its place in the report, how to set it up, and its weight when time is shared out."""

    kind: str
    labels: dict[str, Any]
    enter: Callable[[], list[Entrant]]
    weight: float
    rounds: int = 1 << 30

    @property
    def title(self) -> str:
        return " ".join([self.kind, *(f"{value}" for value in self.labels.values())])


def plan_tasks(
    arguments: argparse.Namespace, subjects: list[Subject], backends: list[str], device: torch.device
) -> list[Task]:
    """All tasks of the parts that were asked for."""
    planned = {
        "step": partial(plan_steps, arguments, subjects),
        "layers": partial(plan_layers, arguments, device),
        "profile": partial(plan_profile, arguments, device),
        "pictures": partial(plan_pictures, arguments, subjects),
        "backends": lambda: (task for name in backends[1:] for task in plan_backend(arguments, subjects, name)),
        "compile": partial(plan_compiled, arguments, subjects),
    }
    return [task for part in PARTS if part in arguments.parts for task in planned[part]()]


def describe_size(size: Size, **more: Any) -> dict[str, Any]:
    return {"width": size.width, "height": size.height, "tokens": size.tokens, **more}


def plan_steps(arguments: argparse.Namespace, subjects: list[Subject]) -> Iterator[Task]:
    for batch in arguments.batch:
        for size in arguments.sizes:
            enter = partial(enter_steps, subjects, size, batch, ("step", "sdpa"), False)
            yield Task("step", describe_size(size, batch=batch, backend="sdpa"), enter, size.work * batch + 1)


def plan_backend(arguments: argparse.Namespace, subjects: list[Subject], backend: str) -> Iterator[Task]:
    for size in arguments.sizes:

        def enter(size=size):
            few = [switch_backend(subject, backend) for subject in subjects if is_wanted(subject.name, FEW)]
            return enter_steps(few, size, arguments.batch[-1], ("step", backend), False)

        labels = describe_size(size, batch=arguments.batch[-1], backend=backend)
        yield Task("step", labels, enter, (size.work * arguments.batch[-1] + 1) / 3)


def plan_compiled(arguments: argparse.Namespace, subjects: list[Subject]) -> Iterator[Task]:
    """The first sizes only: a compilation of the whole UNet for each subject and size."""
    for size in arguments.sizes[:COMPILED_SIZES]:

        def enter(size=size):
            torch._dynamo.reset()  # one compilation a size, none with sizes left open
            allow_compilations(64)  # the subjects share the UNet's code
            few = [compile_subject(subject) for subject in subjects if is_wanted(subject.name, COMPILED)]
            return enter_steps(few, size, arguments.batch[-1], ("step", "compiled"), True)

        labels = describe_size(size, batch=arguments.batch[-1], backend="sdpa", compiled=True)
        yield Task("step", labels, enter, size.work + COMPILING_WEIGHT)


def allow_compilations(count: int) -> None:
    """Raise the limit behind which torch.compile silently runs eagerly; its name depends on PyTorch's version."""
    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", count)


def plan_pictures(arguments: argparse.Namespace, subjects: list[Subject]) -> Iterator[Task]:
    kept: list = []

    def enter(size: Size):
        kept.extend([] if kept else [build_decoder(arguments.checkpoint, arguments.mini)])
        return enter_pictures(subjects, kept[0], size, arguments.steps)

    for size in arguments.sizes[:3]:
        labels = describe_size(size, batch=2, steps=arguments.steps)
        yield Task("picture", labels, partial(enter, size), size.work * arguments.steps / 4 + 1, rounds=3)


def plan_layers(arguments: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    for level in LAYER_LEVELS:
        for side in arguments.layer_sides or LAYER_SIDES:
            layer = Layer(level, Size(side, side), arguments.batch[-1], arguments.mini)
            enter = partial(enter_layers, layer, device, DTYPES[arguments.dtype])
            yield Task("layer", layer.labels, enter, 0.5 + layer.work(layer.tokens) / 4e12)


def plan_profile(arguments: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    for side in arguments.layer_sides or PROFILE_SIDES:
        for trained in (False, True):
            layer = Layer(0, Size(side, side), arguments.batch[-1], arguments.mini)
            enter = partial(enter_parts, layer, trained, device, DTYPES[arguments.dtype])
            labels = {**layer.labels, "student": "trained" if trained else "training-free"}
            yield Task("profile", labels, enter, 0.05 + layer.work(layer.tokens) / 16e12)
