"""The student file: safetensors with the configuration and its origin in the metadata; written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import DHAConfig
from .sites import SITES, Architecture
from .student import Student

FORMAT, VERSION = "dha-student", 1


class StudentFileError(ValueError):
    """The file is no student, or none for this use; says what was found, what was expected and what to do."""


def save_student(
    path: Path, student: Student, teacher: str, prediction: str = "eps", training: Mapping | None = None
) -> None:
    """Write a student in half precision; `teacher` is `fingerprint`'s text, `training` a JSON-able record.

    A crash leaves the old file or none. Raises StudentFileError when a weight is not finite.
    """
    weights = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in student.named_weights().items()}
    if bad := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise StudentFileError(f"{bad[0]} (of {len(bad)}) is not finite in fp16; the student was not saved")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": student.config.to_json(),
        "architecture": describe_architecture(student.architecture),
        "prediction": prediction,
        "teacher": teacher,
        "training": json.dumps(training or {}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v2/{FORMAT}",
        "modelspec.title": path.stem,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save(weights, metadata=metadata))  # `save_file` would keep other users from reading it
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def describe_architecture(architecture: Architecture) -> str:
    """The architecture entry, which `parse_architecture` reads."""
    widths = {"embedding": architecture.embedding, "context": architecture.context}
    return json.dumps({"channels": dict(architecture.channels), **widths})


def load_student(path: Path, operations=nn, head_width: int = 64, dtype: torch.dtype = torch.float32) -> Student:
    """Read and check a student file, weights in `dtype`; raises StudentFileError for every wrong file."""
    metadata, weights = read_file(path)
    check_format(path, metadata)
    config, architecture = read_description(path, metadata)
    check_heads(path, config, architecture, head_width)
    with torch.device("meta"):
        student = Student(config, architecture, operations, head_width)
    check_weights(path, student.named_weights(), weights)
    student.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, tensor in student.named_weights().items():
            tensor.copy_(weights[name])
    return student.eval().requires_grad_(False)


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a student file, checked for format and version alone."""
    metadata, _ = read_file(path, tensors=False)
    check_format(path, metadata)
    return metadata


def read_file(path: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; raises StudentFileError when it is none."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise StudentFileError(f"{path} {found}, expected a student file; put those into ComfyUI's models/dha folder")
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            return file.metadata() or {}, weights
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise StudentFileError(
            f"{path.name} is not a whole safetensors file ({shorten(error)}); it may be a cut-off download or another "
            "kind of file renamed: download it again"
        ) from error


def check_format(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise StudentFileError unless the metadata says it is a student of a version we know."""
    if metadata.get("format") != FORMAT:
        raise StudentFileError(
            f"{path.name} is not a DHA student (format {shorten(metadata.get('format'))!r}, expected {FORMAT!r}); "
            "checkpoints and LoRAs have loaders of their own"
        )
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit()) or len(version) > 9:
        raise StudentFileError(
            f"{path.name} has version {version[:20]!r}, expected a number up to {VERSION}; get the file again"
        )
    if int(version) > VERSION or int(version) < 1:
        raise StudentFileError(
            f"{path.name} has version {version}, this pack reads up to {VERSION}; update the pack to use this student"
        )


def read_description(path: Path, metadata: Mapping[str, str]) -> tuple[DHAConfig, Architecture]:
    """Configuration and architecture of a student file; raises StudentFileError when they cannot be read."""
    try:
        return DHAConfig.from_json(metadata.get("config", "")), parse_architecture(metadata.get("architecture", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StudentFileError(
            f"{path.name}: its description cannot be read ({shorten(error)}); it is damaged or comes from another "
            "program: get the file again"
        ) from error


def shorten(error: object) -> str:
    """A message of a length that a user reads, whatever a file made it quote."""
    text = str(error)
    return text if len(text) <= 200 else f"{text[:200]}..."


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


def check_heads(path: Path, config: DHAConfig, architecture: Architecture, head_width: int) -> None:
    """Raise StudentFileError unless published students' own projections divide into heads."""
    widths = {architecture.channels[site.name] for site in SITES if site.level in config.levels}
    odd = sorted(width for width in widths if width % head_width)
    if config.mode == "official" and odd:
        raise StudentFileError(
            f"{path.name} is a student of mode 'official' with layers {odd[0]} wide, expected multiples of the head "
            f"width {head_width}; use a student of mode 'hybrid' for this architecture"
        )


def check_weights(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise StudentFileError for missing, surplus, wrongly shaped or non-finite tensors."""
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or surplus:
        raise StudentFileError(
            f"{path.name} does not fit its description: {len(missing)} tensors missing {missing[:1]}, "
            f"{len(surplus)} surplus {[shorten(name) for name in surplus[:1]]}; get the file again"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise StudentFileError(
                f"{path.name}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}; "
                "get the file again"
            )
        if not tensor.is_floating_point():
            raise StudentFileError(
                f"{path.name}: {name} is {tensor.dtype}, expected a floating-point type; get the file again"
            )
        if not torch.isfinite(tensor.to(torch.float16)).all():  # fp16 is what a GPU computes in
            raise StudentFileError(
                f"{path.name}: {name} holds values that are not finite numbers in fp16; get the file again"
            )


def check_architecture(name: str, student: Architecture, model: Architecture) -> None:
    """Raise StudentFileError unless a student was made for a model of these widths."""
    if student != model:
        raise StudentFileError(
            f"{name} was trained for {student.label} (time embedding {student.embedding}), the connected model is "
            f"{model.label} (time embedding {model.embedding}); load a student of this model's architecture"
        )


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of a teacher's self-attention weights in half precision: which checkpoint a student came from."""
    digest = hashlib.sha256()
    for site in SITES:
        for part in ("to_q", "to_k", "to_v"):
            weight = state[f"{site.name}.{part}.weight"].detach().to("cpu", torch.float16).contiguous()
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]
