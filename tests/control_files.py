"""Frequency controls for tests: files as if trained, and a studio's model steered by them."""

import copy

import torch

from dha.control import FCNet
from dha.control_file import ControlConfig, ControlFile, save_control
from dha.control_weights import ENCODER, list_shapes


def draw_weights(unet, rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights as if trained: every part of the branch is large enough to be seen in a picture."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    base = unet.state_dict()
    for name, shape in list_shapes(FCNet(copy.deepcopy(unet)), rank).items():
        if rank == 0 and name.startswith(ENCODER):
            weights[name] = base[name].float() * (1 + 0.1 * torch.randn(shape, generator=generator))
        elif name.endswith(".up") or len(shape) == 1:
            weights[name] = 0.02 * torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.randn(shape, generator=generator) * 0.7 * shape[1:].numel() ** -0.5
    return weights


@torch.no_grad()
def open_branch(branch, seed: int = 0) -> None:
    """Make a fresh branch of the trainer's steer visibly, as if what leads out of it were trained."""
    torch.manual_seed(seed)
    for name, weight in branch.weights.items():
        if "zero_convs" in name or "_out_" in name or name.startswith("hint_"):
            weight.normal_(std=0.3 * weight[0].numel() ** -0.5)


def write_control(studio, name: str, band: str = "low", rank: int = 4, seed: int = 0):
    """A control file for the studio's teacher in ComfyUI's models/dha_control."""
    unet = studio.model.model.diffusion_model
    path = studio.base / "models" / "dha_control" / f"{name}.safetensors"
    weights = draw_weights(unet, rank, seed)
    save_control(path, ControlFile(ControlConfig(band, rank), studio.architecture, weights, "test", "v"))
    return path


def load(studio, name: str, **settings):
    return studio.call("DHALoadFrequencyControl", control_name=write_control(studio, name, **settings).name)


def steer(studio, control, source, model=None, strength=1.0, start=0.0, end=1.0, seed=0):
    """Apply Frequency Control with the defaults of the node, by default to the teacher."""
    return studio.call(
        "DHAApplyFrequencyControl",
        model=model or studio.model,
        control=control,
        source={"samples": source},
        strength=strength,
        start_percent=start,
        end_percent=end,
        shuffle_seed=seed,
    )


def draw_source(batch: int = 1, size=(128, 128), seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, size[1] // 8, size[0] // 8, generator=generator)


@torch.inference_mode()
def predict(model, x, context, halves=(0,), sigma: float = 2.0):
    """One call of the UNet as ComfyUI's sampler makes it: the model's own wrappers and patches."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    sigmas = torch.full((len(x),), sigma)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    options |= {"cond_or_uncond": list(halves), "sigmas": sigmas[:1]}
    found = model.model.apply_model(x, sigmas, c_crossattn=context, transformer_options=options)
    model.cleanup()
    return found
