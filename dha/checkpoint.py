"""The student file: safetensors with the configuration and its origin in the metadata; written whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import DHAConfig
from .sites import SITES, Architecture
from .student import Student
from .weight_file import FileKind, check_weights, read_file, shorten, write_weights


class StudentFileError(ValueError):
    """The file is no student, or none for this use; says what was found, what was expected and what to do."""


HEAD_WIDTH = 64  # of SD-2.x
STUDENT = FileKind("dha-student", 1, "student", "DHA student", "models/dha", StudentFileError)


def save_student(
    path: Path, student: Student, teacher: str, prediction: str = "eps", training: Mapping | None = None
) -> None:
    """Write a student in half precision; `teacher` is `fingerprint`'s text, `training` a JSON-able record.

    A crash leaves the old file or none. Raises StudentFileError when a weight is not finite.
    """
    metadata = {
        "config": student.config.to_json(),
        "architecture": describe_architecture(student.architecture),
        "head_width": str(student.head_width),
        "prediction": prediction,
        "teacher": teacher,
        "training": json.dumps(training or {}),
    }
    write_weights(path, STUDENT, student.named_weights(), metadata)


def describe_architecture(architecture: Architecture) -> str:
    """The architecture entry, which `parse_architecture` reads."""
    widths = {"embedding": architecture.embedding, "context": architecture.context}
    return json.dumps({"channels": dict(architecture.channels), **widths})


def load_student(
    path: Path, operations=nn, head_width: int | None = None, dtype: torch.dtype = torch.float32
) -> Student:
    """Read and check a student file, weights in `dtype`; raises StudentFileError for every wrong file.

    `head_width` is for files that do not say it.
    """
    metadata, weights = read_file(path, STUDENT)
    config, architecture = read_description(path, metadata)
    head_width = read_head_width(path, metadata.get("head_width", str(head_width or HEAD_WIDTH)))
    check_heads(path, config, architecture, head_width)
    with torch.device("meta"):
        student = Student(config, architecture, operations, head_width)
    expected = {name: tensor.shape for name, tensor in student.named_weights().items()}
    check_weights(path, STUDENT, expected, weights)
    student.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, tensor in student.named_weights().items():
            tensor.copy_(weights[name])
    return student.eval().requires_grad_(False)


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a student file, checked for format and version alone."""
    return read_file(path, STUDENT, tensors=False)[0]


def read_description(path: Path, metadata: Mapping[str, str]) -> tuple[DHAConfig, Architecture]:
    """Configuration and architecture of a student file; raises StudentFileError when they cannot be read."""
    try:
        return DHAConfig.from_json(metadata.get("config", "")), parse_architecture(metadata.get("architecture", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StudentFileError(
            f"{path.name}: its description cannot be read ({shorten(error)}); it is damaged or comes from another "
            "program: get the file again"
        ) from error


def parse_architecture(text: str) -> Architecture:
    """Read the architecture entry back; raises ValueError, KeyError or TypeError when it is not one."""
    values = json.loads(text)
    channels = {str(name): positive(width) for name, width in values["channels"].items()}
    if set(channels) != {site.name for site in SITES}:
        raise ValueError(f"{len(channels)} attention sites, expected the {len(SITES)} of SD-2.x")
    return Architecture(channels, positive(values["embedding"]), positive(values["context"]))


def positive(value: object) -> int:
    """The value if it is a whole number that a layer width can be; raises ValueError otherwise."""
    if type(value) is not int or not 0 < value <= 65536:
        raise ValueError(f"width {value!r}, expected a whole number from 1 to 65536")
    return value


def read_head_width(path: Path, text: str) -> int:
    """The head width that a file says; raises StudentFileError for anything but a number a layer can be wide."""
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:9]) <= 4096:
        raise StudentFileError(
            f"{path.name} has heads {shorten(text)!r} wide, expected a whole number up to 4096; get the file again"
        )
    return int(text[:9])


def check_heads(path: Path, config: DHAConfig, architecture: Architecture, head_width: int) -> None:
    """Raise StudentFileError unless published students' own projections divide into heads."""
    widths = {architecture.channels[site.name] for site in SITES if site.level in config.levels}
    odd = sorted(width for width in widths if width % head_width)
    if config.mode == "official" and odd:
        raise StudentFileError(
            f"{path.name} is a student of mode 'official' with layers {odd[0]} wide, expected multiples of the head "
            f"width {head_width}; use a student of mode 'hybrid' for this architecture"
        )


def check_architecture(name: str, student: Architecture, model: Architecture) -> None:
    """Raise StudentFileError unless a student was made for a model of these widths."""
    if student != model:
        raise StudentFileError(
            f"{name} was trained for {student.label} (time embedding {student.embedding}), the connected model is "
            f"{model.label} (time embedding {model.embedding}); load a student of this model's architecture, "
            "or go without one (training-free)"
        )


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of a teacher's self-attention weights in half precision: which checkpoint a student came from."""
    digest = hashlib.sha256()
    for site in SITES:
        for part in ("to_q", "to_k", "to_v"):
            weight = state[f"{site.name}.{part}.weight"].detach().to("cpu", torch.float16).contiguous()
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]
