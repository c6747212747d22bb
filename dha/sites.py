"""The 16 self-attentions of an SD-2.1 UNet: their names, resolutions and widths."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

LATENT_CHANNELS = 4


class ArchitectureError(ValueError):
    """The UNet is not of Stable Diffusion 2.1's shape; the message says what was found."""


@dataclass(frozen=True)
class Site:
    """One transformer block's self-attention: `block` as ComfyUI numbers it, `level` 0 at full latent resolution."""

    block: tuple[str, int]
    level: int

    @property
    def name(self) -> str:
        """Path of the attention below the UNet, as in checkpoints."""
        kind, number = self.block
        place = "middle_block.1" if kind == "middle" else f"{kind}_blocks.{number}.1"
        return f"{place}.transformer_blocks.0.attn1"


SITES = (
    *(Site(("input", n), (n - 1) // 3) for n in (1, 2, 4, 5, 7, 8)),
    Site(("middle", 0), 3),
    *(Site(("output", n), 3 - n // 3) for n in range(3, 12)),
)


@dataclass(frozen=True)
class Architecture:
    """Widths of a UNet: channels of every site by name, of the time embedding and of the text context."""

    channels: Mapping[str, int]
    embedding: int
    context: int

    @property
    def label(self) -> str:
        """A short name for messages and metadata: `sd2-unet-320-1024`."""
        return f"sd2-unet-{self.channels[SITES[0].name]}-{self.context}"


def read_architecture(state: Mapping[str, torch.Tensor]) -> Architecture:
    """Architecture of a UNet from its state dict (keys as below `diffusion_model.`).

    Raises ArchitectureError for SD-1.x, SDXL and anything else whose self-attentions sit elsewhere.
    """
    found = {key.removesuffix(".to_q.weight") for key in state if key.endswith(".attn1.to_q.weight")}
    expected = {site.name for site in SITES}
    if found != expected:
        raise ArchitectureError(describe_mismatch(found))
    if state["input_blocks.1.1.proj_in.weight"].ndim != 2:
        raise ArchitectureError("this is a Stable Diffusion 1.x UNet (convolutional proj_in); DHA serves 2.x")
    return Architecture(
        channels={site.name: state[f"{site.name}.to_q.weight"].shape[1] for site in SITES},
        embedding=state["time_embed.2.weight"].shape[0],
        context=state["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
    )


def check_text_to_image(name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, about `name`, for a UNet that is shown a mask, a depth map or another picture as well."""
    channels = state["input_blocks.0.0.weight"].shape[1]
    if channels != LATENT_CHANNELS or "label_emb.0.0.weight" in state:
        kind = "an inpainting or depth model" if channels != LATENT_CHANNELS else "an unCLIP model"
        raise ValueError(
            f"{name} is {kind} ({channels} input channels, expected {LATENT_CHANNELS}), training knows text to image "
            "alone; train with a plain Stable Diffusion 2.x checkpoint, its student fits this model as well"
        )


def describe_mismatch(found: set[str]) -> str:
    """One sentence for a user whose model does not fit."""
    kind = "an SDXL UNet" if any(".transformer_blocks.1.attn1" in name for name in found) else "not an SD-2.1 UNet"
    if not found:
        kind = "not a UNet with attention blocks (Flux, SD3 and other transformers are built differently)"
    return (
        f"this model is {kind}: {len(found)} self-attentions were found, Stable Diffusion 2.x has {len(SITES)} at "
        "known places; connect a Stable Diffusion 2.0 or 2.1 checkpoint"
    )
