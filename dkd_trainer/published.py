"""A published DHA student's Lightning checkpoint, read safely and taken apart by what each tensor is for."""

import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dha.config import DHAConfig
from dha.control_file import STUDENT, UNET, UNUSED
from dha.sites import SITES, Architecture, ArchitectureError, read_architecture
from dha.student import Student
from dha.weight_file import shorten

# tensors below these prefixes belong to parts that a student's file does not hold
PARTS = {
    "control_model.": "control branch",
    "first_stage_model.": "VAE",
    "cond_stage_model.": "text encoder",
    "teacher_model.": "teacher",
}


class PublishedError(ValueError):
    """The file is no published student, or not a whole one; says what was found, what was expected, what to do."""


@dataclass
class Published:
    """A student's tensors: `attention` by site and part, `trunk` by name below the UNet, and what was dropped.

    `dropped` counts tensors and `dropped_weights` their values by part.
    """

    architecture: Architecture
    attention: dict[str, Tensor]
    trunk: dict[str, Tensor]
    dropped: Counter = field(default_factory=Counter)
    dropped_weights: Counter = field(default_factory=Counter)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .ckpt or .safetensors by name; no code of the file is run. Raises PublishedError."""
    if not path.is_file():
        raise PublishedError(f"{path} does not exist; expected a checkpoint (.ckpt or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # a zip can be mapped: what is dropped is never read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise PublishedError(
            f"{path.name} holds more than tensors and plain values ({shorten(error)}), which could run code; "
            "save its state_dict alone, as .safetensors, with the program that made it"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise PublishedError(f"{path.name} cannot be read ({shorten(error)}); get the file again") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def read_published(path: Path, config: DHAConfig, head_width: int = 64) -> Published:
    """A published student with every tensor of its DHA layers checked; raises PublishedError."""
    tensors = read_tensors(path)
    names = {site.name for site in SITES}
    attention, trunk = {}, {}
    dropped, weights = Counter[str](), Counter[str]()
    for name, tensor in tensors.items():
        short = name.removeprefix(STUDENT)
        inside = short.removeprefix(UNET)
        part = find_part(short)
        if part is not None:
            dropped[part] += 1
            weights[part] += tensor.numel()
        elif any(inside.startswith(f"{site}.") for site in names):
            attention[inside] = tensor
        else:
            trunk[inside] = tensor
    architecture = find_architecture(path, attention, trunk)
    check_attention(path, attention, Student(config, architecture, head_width=head_width))
    return Published(architecture, attention, trunk, dropped, weights)


def find_part(name: str) -> str | None:
    """Which part that a student does without a tensor belongs to, None for the UNet's own."""
    if UNUSED in name.split("."):
        return "unused ff_EA"
    if name.startswith(UNET):
        return None
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "others")


def find_architecture(path: Path, attention: Mapping[str, Tensor], trunk: Mapping[str, Tensor]) -> Architecture:
    """Widths of the UNet; raises PublishedError when it is no SD-2.x with DHA layers."""
    found = sum(".attn1.sa_attn.to_q.weight" in name for name in attention)
    try:
        if not found:
            raise ArchitectureError("it has no DHA layers")
        plain = {name.replace(".attn1.sa_attn.", ".attn1."): tensor for name, tensor in attention.items()}
        return read_architecture({**trunk, **plain})
    except (ArchitectureError, KeyError) as error:
        raise PublishedError(
            f"{path.name} is not a published DHA student of SD-2.x: {error} ({found} DHA layers of {len(SITES)}, "
            f"{len(trunk)} other UNet tensors below '{STUDENT}{UNET}' or '{UNET}'); give the Lightning checkpoint"
        ) from error


def check_attention(path: Path, found: Mapping[str, Tensor], student: Student) -> None:
    """Raise PublishedError for missing, surplus and wrongly shaped tensors of the DHA layers."""
    expected = student.named_weights()
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    faults = [
        f"{len(names)} {what} ({names[0]}{describe_shapes(names[0], found, expected) if what == 'misshapen' else ''})"
        for what, names in (("missing", missing), ("surplus", surplus), ("misshapen", wrong))
        if names
    ]
    if faults:
        raise PublishedError(
            f"{path.name}: of the {len(expected)} tensors of its DHA layers there are {', '.join(faults)}; expected a "
            "student of the published code with DHA in all 16 self-attentions"
        )


def describe_shapes(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    return f": {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
