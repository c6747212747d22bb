"""The frequency-control file, and published FCDiffusion teachers and students read as one."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from .checkpoint import describe_architecture, fingerprint, parse_architecture
from .config import GROUPS, NORM_GROUPS
from .control import ATTENTIONS, HINT_WIDTH, PREFIX
from .control_weights import ENCODER, list_shapes
from .frequency import BANDS
from .official import ExternalAttention
from .sites import SITES, Architecture
from .weight_file import FileKind, check_weights, explain_disk, read_file, shorten, write_weights

UNET = "model.diffusion_model."  # of a UNet's weights in checkpoints
STUDENT, STUDENT_GROUPS = "student_model.", 4  # of a published student's tensors; groups of its transformers' norms
UNUSED = "ff_EA"  # layers of published students that are never run
PREDICTIONS = ("eps", "v")
ENCODER_SITES = [site for site in SITES if site.block[0] != "output"]


class ControlFileError(ValueError):
    """The file is no frequency control, or none for this use; says what was found, what was expected, what to do."""


CONTROL = FileKind("dha-control", 1, "frequency control", "frequency control", "models/dha_control", ControlFileError)


@dataclass(frozen=True)
class ControlConfig:
    """The band that a branch was trained for, the rank of its weights, 0 for whole ones, and what `FCNet` is told."""

    band: str
    rank: int = 0
    attention: str = "self"
    norm_groups: int = NORM_GROUPS

    def __post_init__(self):
        if self.band not in BANDS:
            raise ValueError(f"unknown frequency band {self.band!r}, expected one of {', '.join(BANDS)}")
        if type(self.rank) is not int or not 0 <= self.rank <= 4096:
            raise ValueError(f"rank {self.rank!r}, expected a whole number from 0 to 4096")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}, expected one of {', '.join(ATTENTIONS)}")
        if self.attention == "external" and self.rank:
            raise ValueError(f"rank {self.rank} with external attention, expected 0: the model has none to change")
        if type(self.norm_groups) is not int or self.norm_groups not in GROUPS:
            raise ValueError(f"norm_groups {self.norm_groups!r}, expected a power of 2 up to 32")


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
    # copies: a file that stays mapped cannot be replaced on Windows, nor safely overwritten elsewhere
    plain = {name.removeprefix(PREFIX): tensor.clone() for name, tensor in weights.items()}
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


def read_published(path: Path, band: str, norm_groups: int | None = None) -> ControlFile:
    """The control branch of a published FCDiffusion teacher, or DHA student, for the band that it was trained with.

    `norm_groups` None are those of the published code. Nothing in the checkpoint is executed. Raises ControlFileError
    for anything else.
    """
    state = read_checkpoint(path)
    origin = STUDENT if any(name.startswith(STUDENT + PREFIX) for name in state) else ""
    weights, unet = take_part(state, origin + PREFIX), take_part(state, origin + UNET)
    if not weights:
        raise ControlFileError(
            f"{path.name} is no FCDiffusion ({len(state)} tensors, none below {PREFIX!r} or {STUDENT + PREFIX!r}); "
            "expected a published teacher or student"
        )
    attention = "self" if any(name.endswith(".attn1.to_q.weight") for name in weights) else "external"
    if attention == "external":
        weights = unify_names(weights)
    architecture = read_branch_architecture(path, weights, attention)
    if attention == "external":
        check_external(path, weights, unet, architecture)
    teacher = fingerprint(unet) if all(f"{site.name}.to_q.weight" in unet for site in SITES) else "unknown"
    if norm_groups is None:
        norm_groups = STUDENT_GROUPS if origin else NORM_GROUPS
    config = ControlConfig(band, 0, attention, norm_groups)
    return ControlFile(config, architecture, weights, teacher, training={"converted_from": path.name})


def take_part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is used of the tensors below a prefix, without it."""
    names = [name for name in state if name.startswith(prefix) and UNUSED not in name.split(".")]
    return {name.removeprefix(prefix): state[name] for name in names}


def unify_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """External attention directly below `attn1`, wherever it was `attn1.ea_attn`, as it is in DHA layers."""
    plain = {name: name.replace(".attn1.ea_attn.", ".attn1.") for name in weights}
    return {name if plain[name] in weights else plain[name]: tensor for name, tensor in weights.items()}


def check_external(
    path: Path, weights: Mapping[str, Tensor], unet: Mapping[str, Tensor], architecture: Architecture
) -> None:
    """Raise ControlFileError unless a branch's encoder is `unet`'s, where there is one, with external attention."""
    expected = {n: tensor.shape for n, tensor in unet.items() if n.startswith(ENCODER) and ".attn1." not in n}
    for site in ENCODER_SITES:
        channels = architecture.channels[site.name]
        with torch.device("meta"):
            layer = ExternalAttention(channels, 1, channels)
        expected |= {f"{site.name}.{part}": tensor.shape for part, tensor in layer.state_dict().items()}
    found = {n: tensor for n, tensor in weights.items() if n.startswith(ENCODER) and (unet or ".attn1." in n)}
    check_weights(Path(f"the control branch of {path.name}"), CONTROL, expected, found)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning or plain torch checkpoint, read without running its pickled code."""
    if not path.is_file():
        raise ControlFileError(f"{path} does not exist, expected a published FCDiffusion checkpoint (.ckpt)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ControlFileError(explain_disk(path, error)) from error
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ControlFileError(
            f"{path.name} cannot be read safely ({shorten(error)}); it is damaged or holds more than tensors and plain "
            "values: save its state_dict alone with the program that made it"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def read_branch_architecture(path: Path, weights: Mapping[str, Tensor], attention: str) -> Architecture:
    """Widths of the SD-2.x UNet that a whole branch belongs to; its decoder mirrors the encoder.

    Raises ControlFileError when the branch has another shape.
    """
    try:
        part = "k" if attention == "external" else "to_q.weight"
        widths = {site.level: weights[f"{site.name}.{part}"].shape[1] for site in ENCODER_SITES}
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
    except (KeyError, IndexError, ValueError) as error:
        count = sum(name.startswith(ENCODER) for name in weights)
        raise ControlFileError(
            f"{path.name}: its control branch is not FCDiffusion's on SD-2.x ({count} encoder tensors; {error}); "
            "expected a published teacher or student"
        ) from error
