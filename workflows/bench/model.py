"""The UNet and the picture decoder that are timed: of full size or mini, with random weights, or a checkpoint's."""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from tqdm import tqdm

from ..fullsize import AUTOENCODER, UNET
from ..server import PACK

PACKAGE = "dha_pack"  # the name under which this repository is imported as ComfyUI would import it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 1 << 22  # weights drawn at once: their float32 buffer stays small beside the model


def import_from_pack(name: str) -> ModuleType:
    """A module of this pack such as `nodes.apply`, with its relative imports working.

    The `__init__` of the pack and of `nodes` are passed over: they bring in ComfyUI's server and with it ComfyUI's
    top-level module `nodes`, which our folder of that name hides from programs started in the repository.
    """
    for package, folder in ((PACKAGE, PACK), (f"{PACKAGE}.nodes", PACK / "nodes")):
        if package not in sys.modules:
            spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")


def draw_weights(model: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """Fill a module in place with a variance of 1 / fan-in, so that activations neither vanish nor overflow in fp16."""
    generator, buffer = torch.Generator().manual_seed(seed), torch.empty(CHUNK)
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    with torch.no_grad(), tqdm(total=total, desc=f"random {name}", unit="weight", unit_scale=True, delay=1) as bar:
        for key, parameter in parameters.items():
            if parameter.ndim <= 1:
                parameter.fill_(1.0 if key.endswith("weight") else 0.0)
                continue
            deviation = parameter[0].numel() ** -0.5
            for part in parameter.data.view(-1).split(CHUNK):
                part.copy_(buffer[: len(part)].normal_(0, deviation, generator=generator))
                bar.update(len(part))
    return model


def build_model(dtype: torch.dtype, mini: bool):
    """A ModelPatcher around SD-2.1's UNet, full-size or mini, with random weights in `dtype`; no file is read."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if mini:
        architecture = import_from_pack("nodes.mini_sd21").MiniSD21
        config = architecture({**UNET, **architecture.unet_config})
    else:
        config = comfy.supported_models.SD20(dict(UNET))
    config.set_inference_dtype(dtype, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload).eval().requires_grad_(False)
    draw_weights(model.diffusion_model, "UNet")
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), offload)


def load_model(path: Path, dtype: torch.dtype):
    """A checkpoint's ModelPatcher, weights in `dtype`, as the stock loader makes it; text encoder and VAE are left out.

    Raises FileNotFoundError for a missing file, RuntimeError or ArchitectureError for one that is no SD-2.1.
    """
    import comfy.sd

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; without --checkpoint random weights are timed")
    import_from_pack("nodes.mini_sd21").register()
    options = {"dtype": dtype}
    model = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=False, model_options=options
    )[0]
    import_from_pack("dha.sites").read_architecture(model.model.diffusion_model.state_dict())
    return model


def build_decoder(checkpoint: Path | None, mini: bool):
    """ComfyUI's VAE: the checkpoint's, SD's with random weights, or for the mini model the tiny one it comes with."""
    import comfy.sd
    import comfy.utils

    if checkpoint is not None:
        state = comfy.utils.load_torch_file(str(checkpoint))
        state = comfy.utils.state_dict_prefix_replace(state, {"first_stage_model.": ""}, filter_keys=True)
        return comfy.sd.VAE(sd=state)
    if mini:
        from comfy.taesd.taesd import TAESD

        state = draw_weights(TAESD(), "decoder").state_dict()
        state["vae_scale"].fill_(1.0)
        return comfy.sd.VAE(sd=state)
    from comfy.ldm.models.autoencoder import AutoencoderKL

    return comfy.sd.VAE(sd=draw_weights(AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4), "decoder").state_dict())
