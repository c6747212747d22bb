"""What every weights file of ours shares: safetensors that say what they are, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .whole_file import write_whole


class FileKind(NamedTuple):
    """A kind of file: its `format` and newest `version`, what messages call it, its folder, the error it raises."""

    format: str
    version: int
    noun: str
    title: str
    folder: str
    error: type[ValueError]


def write_weights(path: Path, kind: FileKind, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights in half precision; a crash leaves the old file or none.

    Raises the kind's error when a weight is not finite.
    """
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in weights.items()}
    if bad := [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]:
        raise kind.error(f"{bad[0]} (of {len(bad)}) is not finite in fp16; the {kind.noun} was not saved")
    entries = {
        "format": kind.format,
        "version": str(kind.version),
        **metadata,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v2/{kind.format}",
        "modelspec.title": path.stem,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(halves, metadata=entries))  # `save_file` would keep other users from reading it


def read_file(path: Path, kind: FileKind, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file of a kind; raises the kind's error when it is none."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise kind.error(f"{path} {found}, expected a {kind.noun} file; put those into ComfyUI's {kind.folder} folder")
    try:
        path.open("rb").close()  # safetensors would say of a file that it may not read that there is none
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            metadata = file.metadata() or {}
    except OSError as error:
        raise kind.error(explain_disk(path, error)) from error
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise kind.error(
            f"{path.name} is not a whole safetensors file ({shorten(error)}); it may be a cut-off download or another "
            "kind of file renamed: download it again"
        ) from error
    check_format(path, kind, metadata)
    return metadata, weights


def explain_disk(path: Path, error: OSError) -> str:
    """What to say of a file that the system does not hand out, whole or not."""
    return f"{path.name} cannot be read ({shorten(error)}); check its permissions and the disk"


def check_format(path: Path, kind: FileKind, metadata: Mapping[str, str]) -> None:
    """Raise the kind's error unless the metadata says it is of that kind and of a version we know."""
    if metadata.get("format") != kind.format:
        raise kind.error(
            f"{path.name} is not a {kind.title} (format {shorten(metadata.get('format'))!r}, expected "
            f"{kind.format!r}); checkpoints and LoRAs have loaders of their own"
        )
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit()) or len(version) > 9:
        raise kind.error(
            f"{path.name} has version {version[:20]!r}, expected a number up to {kind.version}; get the file again"
        )
    if int(version) > kind.version or int(version) < 1:
        raise kind.error(
            f"{path.name} has version {version}, this pack reads up to {kind.version}; update the pack to use this "
            f"{kind.noun}"
        )


def check_weights(path: Path, kind: FileKind, expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Raise the kind's error for missing, surplus, wrongly shaped or non-finite tensors."""
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or surplus:
        raise kind.error(
            f"{path.name} does not fit its description: {len(missing)} tensors missing {missing[:1]}, "
            f"{len(surplus)} surplus {[shorten(name) for name in surplus[:1]]}; get the file again"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise kind.error(
                f"{path.name}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name])}; "
                "get the file again"
            )
        if not tensor.is_floating_point():
            raise kind.error(
                f"{path.name}: {name} is {tensor.dtype}, expected a floating-point type; get the file again"
            )
        if not torch.isfinite(tensor.to(torch.float16)).all():  # fp16 is what a GPU computes in
            raise kind.error(
                f"{path.name}: {name} holds values that are not finite numbers in fp16; get the file again"
            )


def shorten(error: object) -> str:
    """A message of a length that a user reads, whatever a file made it quote."""
    text = str(error)
    return text if len(text) <= 200 else f"{text[:200]}..."
