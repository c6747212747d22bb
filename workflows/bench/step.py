"""One UNet step as ComfyUI's sampler takes it, and a whole picture: sampling and decoding."""

import uuid
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .contest import Entrant
from .subjects import Subject

TEXT_TOKENS = 77
SIGMA = 3.0  # in the first half of the schedule, where every preset is in its first stretch
CFG = 7.0


class Size(NamedTuple):
    """A picture's width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def tokens(self) -> int:
        """Tokens of the UNet's finest level."""
        return self.width * self.height // 64

    @property
    def work(self) -> float:
        """SD-2.1's FLOPs at this size in units of the linear part at 512 x 512, 85 % of the whole there."""
        relative = self.tokens / 4096
        return relative + 0.18 * relative**2


class Inputs(NamedTuple):
    """What a step gets: latents (B, C, H, W), noise levels (B,), text (B, 77, E), and whose text each row has."""

    latent: Tensor
    sigma: Tensor
    text: Tensor
    uuids: list


def draw_inputs(model, size: Size, batch: int) -> Inputs:
    """Noise for a size that is the same in every run."""
    generator, device = torch.Generator().manual_seed(1), model.load_device
    channels, width = model.model.latent_format.latent_channels, model.model.model_config.unet_config["context_dim"]
    latent = torch.randn(batch, channels, size.height // 8, size.width // 8, generator=generator) * SIGMA
    text = torch.randn(batch, TEXT_TOKENS, width, generator=generator)
    uuids = [uuid.uuid4() for _ in range(batch)]  # as in sampling, the same from step to step
    return Inputs(latent.to(device), torch.full((batch,), SIGMA, device=device), text.to(device), uuids)


def load(model, inputs: Inputs) -> None:
    """Have ComfyUI load a subject as its sampler would; clones share weights, so none are moved from lap to lap."""
    import comfy.model_management

    models = [model, *model.get_nested_additional_models()]
    required = model.memory_required([inputs.latent.shape[0] * 2, *inputs.latent.shape[1:]])
    comfy.model_management.load_models_gpu(models, memory_required=required)
    model.pre_run()


def run_step(model, inputs: Inputs) -> Tensor:
    """One call of the UNet, options as in ComfyUI's `calc_cond_batch`; the predicted picture (B, C, H, W)."""
    options = {
        **model.model_options["transformer_options"],
        "cond_or_uncond": list(range(len(inputs.uuids))),
        "uuids": inputs.uuids,
        "sigmas": inputs.sigma,
        "wrappers": model.wrappers,
    }
    return model.model.apply_model(inputs.latent, inputs.sigma, c_crossattn=inputs.text, transformer_options=options)


def run_picture(model, decoder, inputs: Inputs, steps: int) -> Tensor:
    """Euler steps with guidance and the decoding, loading of the decoder included; a picture (1, H, W, 3)."""
    import comfy.sample

    positive, negative = ([[text, {}]] for text in inputs.text.split(1))
    settings = {"disable_pbar": True, "seed": 1}
    noise, empty = inputs.latent[:1].cpu() / SIGMA, torch.zeros_like(inputs.latent[:1], device="cpu")
    sampled = comfy.sample.sample(model, noise, steps, CFG, "euler", "normal", positive, negative, empty, **settings)
    return decoder.decode(sampled)


def enter_steps(subjects: Sequence[Subject], size: Size, batch: int, family: tuple, compiled: bool) -> list[Entrant]:
    """UNet steps of the subjects for a contest."""
    inputs = draw_inputs(subjects[0].model, size, batch)
    return [
        Entrant(
            subject.name,
            subject.title,
            partial(run_step, subject.model, inputs),
            partial(load, subject.model, inputs),
            work=size.work * batch,
            family=(*family, subject.name),
            compiled=compiled,
        )
        for subject in subjects
    ]


def enter_pictures(subjects: Sequence[Subject], decoder, size: Size, steps: int) -> list[Entrant]:
    """Whole pictures of the subjects for a contest."""
    inputs = draw_inputs(subjects[0].model, size, batch=2)
    return [
        Entrant(
            subject.name,
            subject.title,
            partial(run_picture, subject.model, decoder, inputs, steps),
            work=size.work * steps,
            family=("picture", subject.name),
        )
        for subject in subjects
    ]
