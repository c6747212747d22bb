"""A control branch's weights as its file holds them: all of them, or low-rank changes of the UNet's own encoder."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ENCODER = ("time_embed.", "input_blocks.", "middle_block.")  # what a branch has in common with its UNet
ZERO = (
    "hint_add.",
    "hint_mul.",
    "zero_convs_add.",
    "zero_convs_mul.",
    "middle_block_out_add.",
    "middle_block_out_mul.",
)


def list_shapes(branch: nn.Module, rank: int) -> dict[str, torch.Size]:
    """Shapes by name of what a file of this rank holds for a branch; rank 0 is all weights, as published.

    A weight (outputs, inputs...) of the encoder becomes `.up` (outputs, rank) and `.down` (rank, inputs), or `.shift`
    of its own shape where that is smaller; the hint's and the connecting convolutions are whole.
    """
    shapes: dict[str, torch.Size] = {}
    for name, tensor in branch.state_dict().items():
        outputs, inputs = tensor.shape[0], tensor[0].numel()
        if not rank or not name.startswith(ENCODER):
            shapes[name] = tensor.shape
        elif rank * (outputs + inputs) < outputs * inputs:
            shapes[f"{name}.up"], shapes[f"{name}.down"] = torch.Size((outputs, rank)), torch.Size((rank, inputs))
        else:
            shapes[f"{name}.shift"] = tensor.shape
    return shapes


def start_weights(branch: nn.Module, base: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Weights to train from: the encoder is `base`, the UNet's own, and the connecting convolutions are zero.

    The hint's convolution is taken from the branch, which draws it when it is made.
    """
    weights = {}
    for name, shape in list_shapes(branch, rank).items():
        if name.endswith(".down"):
            weights[name] = torch.randn(shape) * shape[1] ** -0.5
        elif name.endswith((".up", ".shift")) or name.startswith(ZERO):
            weights[name] = torch.zeros(shape)
        else:
            source = base if name.startswith(ENCODER) else branch.state_dict()
            weights[name] = source[name].detach().float().cpu().clone()
    return weights


def merge_weights(base: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a branch from a file's weights and, for what they change, the UNet's own encoder `base`.

    In fp32, but for the products of low rank where autocast lowers them.
    """
    state = {}
    for name, tensor in weights.items():
        stem, _, part = name.rpartition(".")
        if part == "up":
            change = tensor.float() @ weights[f"{stem}.down"].float()
            state[stem] = base[stem].to(change) + change.view(base[stem].shape)
        elif part == "shift":
            state[stem] = base[stem].to(tensor.device, torch.float32) + tensor.float()
        elif part != "down":
            state[name] = tensor
    return state
