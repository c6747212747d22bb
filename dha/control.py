"""FCNet, FCDiffusion's control branch (arXiv 2407.03006), and how its outputs enter a UNet's decoder."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import NORM_GROUPS
from .official import ExternalAttention
from .sites import LATENT_CHANNELS

PREFIX = "control_model."  # of its weights in published checkpoints and in our files
HINT_WIDTH = 512
ATTENTIONS = ("self", "external")  # of a teacher's branch and of a published student's


class Pair(NamedTuple):
    """What modulates a feature map h into (1 + mul) * h + add; both are of h's shape (B, C, H, W)."""

    add: Tensor
    mul: Tensor

    def scale(self, strength: float) -> "Pair":
        return self if strength == 1 else Pair(self.add * strength, self.mul * strength)

    def repeat(self, times: int) -> "Pair":
        """The batch `times` over: once for every half of classifier-free guidance."""
        return self if times == 1 else Pair(self.add.repeat(times, 1, 1, 1), self.mul.repeat(times, 1, 1, 1))

    def apply(self, h: Tensor) -> Tensor:
        return (1 + self.mul) * h + self.add


class FCNet(nn.Module):
    """A UNet's encoder and middle block that see a hint, and two 1x1 convolutions (add, mul) after each of the blocks.

    `encoder` is a UNet of the host's: its `time_embed`, `input_blocks` and `middle_block` become this branch's own, so
    that the forward passes of the blocks, called as `block(h, emb, context, options)`, are the host's as well.
    State names are as published, below `control_model.`. `operations` supplies Conv2d and LayerNorm. Published students
    have `external` attention in place of self-attention, and fewer `norm_groups` in front of each transformer.
    """

    def __init__(
        self,
        encoder: Any,
        operations=nn,
        hint_width: int = HINT_WIDTH,
        attention: str = "self",
        norm_groups: int = NORM_GROUPS,
        **factory,
    ):
        super().__init__()
        self.attention = attention
        self.time_embed, self.input_blocks = encoder.time_embed, encoder.input_blocks
        self.middle_block = encoder.middle_block
        self.adapt_transformers(norm_groups, operations)

        def connect(inputs: int, outputs: int) -> nn.Module:
            return operations.Conv2d(inputs, outputs, 1, **factory)

        widths = [block[0].out_channels for block in self.input_blocks]
        middle = self.middle_block[0].out_channels
        self.input_hint_block = nn.Sequential(
            operations.Conv2d(LATENT_CHANNELS, hint_width, 3, padding=1, **factory), nn.SiLU()
        )
        self.hint_add, self.hint_mul = connect(hint_width, widths[0]), connect(hint_width, widths[0])
        self.zero_convs_add = nn.ModuleList(nn.Sequential(connect(width, width)) for width in widths)
        self.zero_convs_mul = nn.ModuleList(nn.Sequential(connect(width, width)) for width in widths)
        self.middle_block_out_add = nn.Sequential(connect(middle, middle))
        self.middle_block_out_mul = nn.Sequential(connect(middle, middle))

    def adapt_transformers(self, norm_groups: int, operations) -> None:
        for transformer in [module for module in self.modules() if hasattr(module, "transformer_blocks")]:
            transformer.norm.num_groups = norm_groups
            if self.attention == "external":
                for block in transformer.transformer_blocks:
                    block.attn1 = BranchAttention(block.attn1, operations)

    def embed_hint(self, hint: Tensor) -> Pair:
        """The hint (B, 4, h, w), a band of the source latent, as what it does to the first feature map (B, C, h, w)."""
        features = self.input_hint_block(hint)
        return Pair(self.hint_add(features), self.hint_mul(features))

    def forward(self, x: Tensor, hint: Pair, timesteps: Tensor, context: Tensor, options: dict) -> list[Pair]:
        """Pairs for every input block's skip and, last, for the middle block, from noisy latents x (B, 4, h, w).

        `hint` is from `embed_hint`, timesteps (B,), context (B, 77, C); `options` go to the blocks and are written to.
        """
        if self.attention == "external":  # a student's patches are meant for a self-attention's projections
            options = {name: value for name, value in options.items() if name not in ("patches", "patches_replace")}
        width = self.time_embed[0].in_features
        emb = self.time_embed(embed_time(timesteps, width).to(x.dtype))
        for patch in options.get("patches", {}).get("emb_patch", []):
            emb = patch(emb, width, options)
        h, pairs = x, []
        for number, block in enumerate(self.input_blocks):
            options["block"] = ("input", number)
            h = block(h, emb, context, options)
            if number == 0:
                h = hint.apply(h)
            pairs.append(Pair(self.zero_convs_add[number](h), self.zero_convs_mul[number](h)))
        options["block"] = ("middle", 0)
        h = self.middle_block(h, emb, context, options)
        return [*pairs, Pair(self.middle_block_out_add(h), self.middle_block_out_mul(h))]


class BranchAttention(ExternalAttention):
    """External attention in the place, and of the heads and width, of a self-attention of the host's."""

    def __init__(self, replaced: Any, operations=nn):
        channels, heads = replaced.to_q.in_features, replaced.heads
        with replaced.to_q.weight.device:
            super().__init__(channels, heads, channels // heads, operations)
        for slots in (self.k, self.v):
            nn.init.normal_(slots, std=channels**-0.5)

    def forward(self, x: Tensor, context=None, value=None, transformer_options=None) -> Tensor:
        """(B, N, C) -> (B, N, C), whatever else a block of the host's gives to a self-attention."""
        return super().forward(x)


def embed_time(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoids (B, width) of timesteps (B,): cosines, then sines, of frequencies 10000^(-2k / width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def make_wrapper(steer: Callable, key: str) -> Callable:
    """ComfyUI's `diffusion_model` wrapper that leaves what a branch says under `key` for `make_decoder_patch`.

    `steer(x, timesteps, context, options)` gives the pairs of one forward, or None where there is no control.
    """

    def run(executor, x, timesteps, context, y=None, control=None, transformer_options=None, **kwargs):
        options = dict(transformer_options or {})
        options[key] = steer(x, timesteps, context, options)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    return run


def control_options(steer: Callable, key: str = "dha_control") -> dict[str, Any]:
    """`transformer_options` that steer a bare UNet of the host's, without a model patcher."""
    wrappers = {"diffusion_model": {key: [make_wrapper(steer, key)]}}
    return {"wrappers": wrappers, "patches": {"output_block_patch": [make_decoder_patch(key)]}}


def apply_pairs(options: Mapping[str, Any], pairs: Sequence[Pair], key: str = "dha_control") -> dict[str, Any]:
    """`transformer_options` that also apply known pairs to one forward of a bare UNet of the host's."""
    patches = dict(options.get("patches", {}))
    patches["output_block_patch"] = [*patches.get("output_block_patch", []), make_decoder_patch(key)]
    return {**options, key: pairs, "patches": patches}


def make_decoder_patch(key: str) -> Callable:
    """ComfyUI's `output_block_patch` that applies the pairs found under `key` in its options, and nothing without them.

    The middle block's output and each skip become (1 + mul) * h + add, whatever an ordinary ControlNet added before.
    """

    def output_block_patch(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        pairs: Sequence[Pair] | None = options.get(key)
        if pairs is None:
            return h, skip
        number = options["block"][1]
        return pairs[-1].apply(h) if number == 0 else h, pairs[-2 - number].apply(skip)

    return output_block_patch
