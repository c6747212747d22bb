"""Write the mini teacher as one checkpoint in SD-2.1's layout, which the stock loader reads once the pack is there."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..engine.schedule import save_state
from ..host import register_mini
from .autoencoder import Autoencoder, widen


def unet_config(mini) -> dict:
    """The detection keys and sizes from which ComfyUI builds the UNet."""
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": mini.MODEL_CHANNELS,
        "num_res_blocks": [2] * 4,
        "transformer_depth": [1] * 6 + [0] * 2,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "context_dim": mini.TEXT_WIDTH,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


def assemble_checkpoint(unet: dict, text: dict, autoencoder: dict) -> dict[str, torch.Tensor]:
    """State dicts of the three parts -> one state dict with SD-2.1's names, fp16."""
    mini = register_mini()
    config = mini.MiniSD21(unet_config(mini))
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    clip = {f"clip_h.{name}": tensor for name, tensor in text.items()}
    state.update(config.process_clip_state_dict_for_saving(clip))
    state.update({f"first_stage_model.{name}": tensor for name, tensor in widen(autoencoder).items()})
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in state.items()}


def split_checkpoint(path: Path) -> tuple[dict, dict, dict]:
    """State dicts of UNet, text encoder and (narrow) autoencoder out of a checkpoint that `save_checkpoint` wrote."""
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    mini = register_mini()
    prefix = "model.diffusion_model."
    unet = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    clip = mini.MiniSD21(unet_config(mini)).process_clip_state_dict(dict(state))
    text = {name.removeprefix("clip_h."): t for name, t in clip.items() if name.startswith("clip_h.")}
    narrow = Autoencoder().state_dict()
    wide = {name: state[f"first_stage_model.{name}"] for name in narrow}
    cut = {name: wide[name][tuple(slice(size) for size in tensor.shape)].clone() for name, tensor in narrow.items()}
    return unet, text, cut


def blank_unused_words(text: dict, used: set[int]) -> dict:
    """The text encoder with zero embeddings for tokens that training never showed."""
    name = "transformer.text_model.embeddings.token_embedding.weight"
    kept = torch.zeros_like(text[name])
    rows = torch.tensor(sorted(used))
    kept[rows] = text[name][rows]
    return {**text, name: kept}


def save_checkpoint(
    path: Path, unet: nn.Module, text: nn.Module, autoencoder: nn.Module, used: set[int], record: dict
) -> None:
    """Write the checkpoint atomically; refuses weights that the loader would not take for v-prediction."""
    state = assemble_checkpoint(
        unet.state_dict(), blank_unused_words(text.state_dict(), used), autoencoder.state_dict()
    )
    spread = (
        state["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"].float().std(unbiased=False)
    )
    if spread <= 0.09:
        raise ValueError(f"norm1.bias of the last block spreads by {spread:.3f}; ComfyUI reads v-prediction above 0.09")
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v2-mini",
        "modelspec.title": "Mini SD-2.1 (emoji)",
        "modelspec.license": "weights trained on Apache-2.0, MIT and CC-BY-4.0 art, see NOTICE",
        "training": json.dumps(record),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(partial, path)


def start_from(path: Path, work: Path, steps: int) -> int:
    """Put a checkpoint into `work` as states that training goes on from, optimisers fresh; returns its step.

    Raises FileExistsError when `work` holds a training already, ValueError when it has its `steps` behind it.
    """
    if (work / "teacher.pt").exists():
        raise FileExistsError(f"{work} holds a training already; leave out --start to go on with it")
    unet, text, autoencoder = split_checkpoint(path)
    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["training"])["steps"]
    if step >= steps:
        raise ValueError(f"{path.name} was trained for {step} steps; give --steps above that, found {steps}")
    model = {f"unet.{n}": t for n, t in unet.items()} | {f"text.{n}": t for n, t in text.items()}
    save_state(work / "autoencoder.pt", {"model": autoencoder, "step": 10**9})
    fresh = {"step": step, "best": float("inf"), "groups": []}
    save_state(work / "teacher.pt", {"model": model, "average": model, **fresh})
    return step
