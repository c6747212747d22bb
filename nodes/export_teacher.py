"""The checkpoint that a workflow built, LoRAs baked in, as a file that a training learns from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.utils
import torch

from ..dha.sites import LATENT_CHANNELS, ArchitectureError, check_text_to_image, read_architecture
from ..dha.whole_file import replace_whole
from . import apply, control

TEXT_ENCODER = "clip_h."  # how SD-2.x's text encoder calls its weights


def check_teacher(model, clip, vae) -> None:
    """Raise ValueError or ArchitectureError unless these are the parts of a plain SD-2.x checkpoint."""
    options = model.model_options["transformer_options"]
    if apply.KEY in options:
        raise ValueError(
            "DKD Train: this model went through Apply DHA, a student cannot teach; connect the model from before it"
        )
    if any(key.startswith(control.KEY) for key in model.additional_models):
        raise ValueError(
            "DKD Train: this model went through Apply Frequency Control, which a checkpoint cannot hold; connect the "
            "model from before it"
        )
    state = model.model.diffusion_model.state_dict()
    try:
        read_architecture(state)
    except ArchitectureError as error:
        raise ArchitectureError(f"DKD Train: {error}") from error
    check_text_to_image("DKD Train: this", state)
    check_companions(model, clip, vae)


def check_companions(model, clip, vae) -> None:
    """Raise ValueError for a text encoder, a VAE or a prediction type that is not the checkpoint's own."""
    if not any(name.startswith(TEXT_ENCODER) for name in clip.cond_stage_model.state_dict()):
        raise ValueError("DKD Train: the connected CLIP is not Stable Diffusion 2's; connect that of the checkpoint")
    if vae.latent_channels != LATENT_CHANNELS:
        raise ValueError(
            f"DKD Train: the connected VAE has {vae.latent_channels} latent channels, expected {LATENT_CHANNELS}; "
            "connect that of the checkpoint"
        )
    sampling = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    if sampling != (model.model.model_type == comfy.model_base.ModelType.V_PREDICTION):
        raise ValueError(
            "DKD Train: a ModelSamplingDiscrete node gives this model another prediction type than its checkpoint has, "
            "which a checkpoint file cannot say; connect the model from before it"
        )


def collect_weights(model, clip, vae) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as ComfyUI's CheckpointSave writes them, patches applied."""
    models = [model, clip.load_model()]
    texts, pictures = clip.get_sd(), vae.get_sd()
    # whole: layers that stay on the processor get their LoRAs there, rounded otherwise, and the run another name
    comfy.model_management.load_models_gpu(models, force_patch_weights=True, force_full_load=True)
    return model.model.state_dict_for_saving(texts, pictures)


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of named tensors, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write weights as a checkpoint, whole or not at all."""
    with replace_whole(path) as partial:
        comfy.utils.save_torch_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(partial))
