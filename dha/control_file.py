"""The frequency-control file, and published FCDiffusion checkpoints read as one."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from .checkpoint import describe_architecture, fingerprint, parse_architecture
from .control import HINT_WIDTH, PREFIX
from .control_weights import ENCODER, list_shapes
from .frequency import BANDS
from .sites import SITES, Architecture
from .weight_file import FileKind, check_weights, read_file, shorten, write_weights

UNET = "model.diffusion_model."  # of a UNet's weights in checkpoints
PREDICTIONS = ("eps", "v")


class ControlFileError(ValueError):
    """The file is no frequency control, or none for this use; says what was found, what was expected, what to do."""


CONTROL = FileKind("dha-control", 1, "frequency control", "frequency control", "models/dha_control", ControlFileError)


@dataclass(frozen=True)
class ControlConfig:
    """The band that a branch was trained for and the rank of its weights, 0 for whole ones."""

    band: str
    rank: int = 0

    def __post_init__(self):
        if self.band not in BANDS:
            raise ValueError(f"unknown frequency band {self.band!r}, expected one of {', '.join(BANDS)}")
        if type(self.rank) is not int or not 0 <= self.rank <= 4096:
            raise ValueError(f"rank {self.rank!r}, expected a whole number from 0 to 4096")


@dataclass(frozen=True)
class ControlFile:
    """What a file holds: `weights` by name, without the prefix; `teacher` is `fingerprint`'s text or `unknown`."""

    config: ControlConfig
    architecture: Architecture
    weights: Mapping[str, Tensor]
    teacher: str = "unknown"
    prediction: str = "eps"
    training: Mapping = dataclasses.field(default_factory=dict)


def save_control(path: Path, control: ControlFile) -> None:
    """Write a control in half precision, whole or not at all; raises ControlFileError when a weight is not finite."""
    metadata = {
        "config": json.dumps(dataclasses.asdict(control.config), sort_keys=True),
        "architecture": describe_architecture(control.architecture),
        "prediction": control.prediction,
        "teacher": control.teacher,
        "training": json.dumps(dict(control.training)),
    }
    write_weights(path, CONTROL, {PREFIX + name: tensor for name, tensor in control.weights.items()}, metadata)


def load_control(path: Path) -> ControlFile:
    """Read a control file; its weights can be checked only with a branch: `check_control`. Raises ControlFileError."""
    metadata, weights = read_file(path, CONTROL)
    try:
        config = ControlConfig(**json.loads(metadata.get("config", "")))
        architecture = parse_architecture(metadata.get("architecture", ""))
        training = dict(json.loads(metadata.get("training", "{}")))
        if metadata.get("prediction") not in PREDICTIONS:
            raise ValueError(f"prediction {metadata.get('prediction')!r}, expected one of {PREDICTIONS}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ControlFileError(
            f"{path.name}: its description cannot be read ({shorten(error)}); it is damaged or comes from another "
            "program: get the file again"
        ) from error
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    teacher = metadata.get("teacher", "unknown")
    return ControlFile(config, architecture, plain, teacher, metadata["prediction"], training)


def check_control(name: str, control: ControlFile, branch: nn.Module, architecture: Architecture) -> None:
    """Raise ControlFileError unless a control's weights are those of an FCNet for a model of these widths."""
    if control.architecture != architecture:
        raise ControlFileError(
            f"{name} was trained for {control.architecture.label} (time embedding {control.architecture.embedding}), "
            f"the connected model is {architecture.label} (time embedding {architecture.embedding}); load a frequency "
            "control of this model's architecture"
        )
    check_weights(Path(name), CONTROL, list_shapes(branch, control.config.rank), control.weights)


def read_published(path: Path, band: str) -> ControlFile:
    """The control branch of a published FCDiffusion checkpoint for the band that it was trained with.

    Nothing in the checkpoint is executed. Raises ControlFileError for anything else, published students included.
    """
    state = read_checkpoint(path)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    if not weights:
        students = [name for name in state if name.startswith(f"student_model.{PREFIX}")]
        kind = "a published DHA student, whose control branch has no self-attention" if students else "no FCDiffusion"
        raise ControlFileError(
            f"{path.name} is {kind} ({len(state)} tensors, none below {PREFIX!r}); expected an FCDiffusion teacher"
        )
    unet = {name.removeprefix(UNET): tensor for name, tensor in state.items() if name.startswith(UNET)}
    architecture = read_branch_architecture(path, weights)
    teacher = fingerprint(unet) if all(f"{site.name}.to_q.weight" in unet for site in SITES) else "unknown"
    return ControlFile(ControlConfig(band), architecture, weights, teacher, training={"converted_from": path.name})


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning or plain torch checkpoint, read without running its pickled code."""
    if not path.is_file():
        raise ControlFileError(f"{path} does not exist, expected a published FCDiffusion checkpoint (.ckpt)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ControlFileError(
            f"{path.name} cannot be read safely ({shorten(error)}); it is damaged or holds more than tensors and plain "
            "values: save its state_dict alone with the program that made it"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def read_branch_architecture(path: Path, weights: Mapping[str, Tensor]) -> Architecture:
    """Widths of the SD-2.x UNet that a whole branch belongs to; its decoder mirrors the encoder.

    Raises ControlFileError when the branch has another shape.
    """
    try:
        widths = {
            site.level: weights[f"{site.name}.to_q.weight"].shape[1] for site in SITES if site.block[0] != "output"
        }
        if (
            weights["input_hint_block.0.weight"].shape[0] != HINT_WIDTH
            or weights["input_blocks.1.1.proj_in.weight"].ndim != 2
        ):
            raise ValueError("the hint's width or the projections are not FCDiffusion's")
        return Architecture(
            channels={site.name: widths[site.level] for site in SITES},
            embedding=weights["time_embed.2.weight"].shape[0],
            context=weights["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        )
    except (KeyError, ValueError) as error:
        count = sum(name.startswith(ENCODER) for name in weights)
        raise ControlFileError(
            f"{path.name}: its control branch is not FCDiffusion's on SD-2.x ({count} encoder tensors; {error}); "
            "expected the published teacher"
        ) from error
