"""What a forward of the UNet shows on its way: block outputs and the replaced self-attentions' inputs and outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Features:
    """One forward's outputs of the UNet's 25 blocks, and inputs and outputs (B, N, C) of self-attentions by block."""

    def __init__(self) -> None:
        self.blocks: dict[int, Tensor] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[tuple[str, int], Tensor] = {}
        self.emb: Tensor | None = None

    def add_to(self, options: dict[str, Any]) -> dict[str, Any]:
        """`transformer_options` that also fill in the attentions' part: inputs before, outputs after other patches."""

        def keep_embedding(emb, _channels, _options):
            self.emb = emb
            return emb

        def keep_input(n, context, value, extra):
            self.inputs[extra["block"]] = n
            return n, context, value

        def keep_output(out, extra):
            self.outputs[extra["block"]] = out
            return out

        patches = dict(options.get("patches", {}))
        patches["emb_patch"] = [keep_embedding, *patches.get("emb_patch", [])]
        patches["attn1_patch"] = [keep_input, *patches.get("attn1_patch", [])]
        patches["attn1_output_patch"] = [*patches.get("attn1_output_patch", []), keep_output]
        return {**options, "patches": patches}


@contextmanager
def keep_blocks(unet: nn.Module, features: Features | None) -> Iterator[None]:
    """Fill in the blocks' part of `features` while it lasts; with None it does nothing."""
    blocks = [] if features is None else list_blocks(unet)

    def keep(number: int) -> Callable:
        def hook(_module, _inputs, output):
            features.blocks[number] = output

        return hook

    # The UNet calls the layers, not the blocks: the last layer puts out what the block does.
    handles = [block[-1].register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def list_blocks(unet: nn.Module) -> list[nn.Module]:
    """Encoder, middle and decoder blocks in the order they run; a control branch has no decoder."""
    return [*unet.input_blocks, unet.middle_block, *getattr(unet, "output_blocks", [])]


@contextmanager
def recompute_layers(unet: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let every layer of the blocks keep only its input and run once more in the backward pass (arXiv 1604.06174)."""
    layers = [layer for block in list_blocks(unet) for layer in block] if wanted else []
    for layer in layers:
        layer.forward = checkpointed(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def checkpointed(forward: Callable) -> Callable:
    """`forward` that runs again for its gradients, with the options it had: the UNet changes them at every block."""

    def run(*inputs, **named):
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        kept = [dict(value) if isinstance(value, dict) else value for value in inputs]
        return checkpoint(forward, *kept, use_reentrant=False, **named)

    return run
