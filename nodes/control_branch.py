"""A frequency control inside ComfyUI: built on the host's own UNet layers, run before each UNet call, steering it."""

import logging
import weakref
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..dha.checkpoint import fingerprint
from ..dha.control import FCNet, Pair
from ..dha.control_file import ControlFile, check_control
from ..dha.control_weights import merge_weights
from ..dha.frequency import filter_band
from ..dha.patch import WATCH
from ..dha.sites import LATENT_CHANNELS, read_architecture
from .apply import PATCHES

ENTRY = "input_blocks.0.0.weight"
FOREIGN = ("patches", "patches_replace", WATCH)  # what other nodes changed is meant for the UNet, not for the branch


@dataclass
class LoadedControl:
    """A control file, and the branches built from it, one for each checkpoint that it was connected to."""

    name: str
    file: ControlFile
    branches: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)

    def build_for(self, model) -> comfy.model_patcher.ModelPatcher:
        """The branch for a model, in the hands of ComfyUI's memory management; built once for each checkpoint.

        Raises ControlFileError or ArchitectureError when the two do not fit.
        """
        if model.model not in self.branches:
            self.branches[model.model] = build_branch(model, self.name, self.file)
        return self.branches[model.model]


def build_branch(model, name: str, control: ControlFile) -> comfy.model_patcher.ModelPatcher:
    """A control branch of ComfyUI's own UNet layers with a file's weights."""
    base = read_base(model)
    architecture = read_architecture(base)
    dtype = torch.float16 if comfy.model_management.should_use_fp16(model.load_device) else torch.float32
    config = {**model.model.model_config.unet_config, "dtype": dtype, "device": "meta", "in_channels": LATENT_CHANNELS}
    config.pop("disable_unet_model_creation", None)
    operations = comfy.ops.manual_cast
    kind = {"attention": control.config.attention, "norm_groups": control.config.norm_groups}
    branch = FCNet(UNetModel(**config, operations=operations), operations, **kind, dtype=dtype, device="meta")
    check_control(name, control, branch, architecture)
    if control.config.rank and control.teacher != fingerprint(base):
        logging.info("Frequency control: %s changes the encoder of another checkpoint than the one connected.", name)
    branch.load_state_dict(
        {k: v.to("cpu", dtype) for k, v in merge_weights(base, control.weights).items()}, assign=True
    )
    branch.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(branch, model.load_device, model.offload_device)


def read_base(model) -> dict[str, torch.Tensor]:
    """A UNet's state without LoRAs and other weight patches, which ComfyUI may have written into it for now.

    Of an inpainting UNet's input only the latent's channels are taken: the branch sees neither mask nor masked picture.
    """
    state = model.model.diffusion_model.state_dict()
    base = {
        name: model.backup[key].weight if (key := f"diffusion_model.{name}") in model.backup else tensor
        for name, tensor in state.items()
    }
    return {**base, ENTRY: base[ENTRY][:, :LATENT_CHANNELS]}


class Hint:
    """The band of a source latent, and what a branch makes of it: once for each size and batch of a sampling."""

    def __init__(self, latents: torch.Tensor, band: str, seed: int):
        self.latents, self.band, self.seed = latents, band, seed
        self.embedded: dict[tuple, Pair] = {}

    def embed(self, branch: FCNet, x: torch.Tensor, count: int) -> Pair:
        """For `count` pictures of the size of x (B, 4, h, w): sources in turn, scaled to cover other sizes.

        Nothing is kept from compiled code: a tensor made in a CUDA graph is overwritten by the next one.
        """
        if torch.compiler.is_compiling():
            return self.compute(branch, x, count)
        key = (count, *x.shape[-2:], x.dtype, x.device)
        if key not in self.embedded:
            self.embedded[key] = self.compute(branch, x, count)
        return self.embedded[key]

    def compute(self, branch: FCNet, x: torch.Tensor, count: int) -> Pair:
        """The same, anew."""
        height, width = x.shape[-2:]
        latents = comfy.utils.common_upscale(self.latents.float(), width, height, "bilinear", "center")
        latents = comfy.utils.repeat_to_batch_size(latents, count).to(x.device)
        return branch.embed_hint(filter_band(latents, self.band, self.seed).to(x.dtype))

    def forget(self, _patcher=None) -> None:
        self.embedded.clear()


def make_steering(branch: FCNet, hint: Hint, strength: float, clock, accelerate: bool = False):
    """What a control says about a forward of the UNet, as `dha.control.make_wrapper` wants it.

    With `accelerate` the branch's layers, which are near the UNet's own, run with what Apply DHA gave the UNet's.
    """

    def steer(x, timesteps, context, options) -> list[Pair] | None:
        if clock is not None and clock(options) is None:
            return None
        halves = len(options.get("cond_or_uncond", ())) or 1
        own = {name: value for name, value in options.items() if name not in FOREIGN}
        if accelerate and PATCHES in options:
            own |= options[PATCHES].as_options()
        latents = x[:, :LATENT_CHANNELS]
        embedded = hint.embed(branch, latents, len(x) // halves).repeat(halves)
        pairs = branch(latents, embedded, timesteps, context, own)
        return [pairs.pop(0).scale(strength) for _ in range(len(pairs))]  # one by one: together they are large

    return steer
