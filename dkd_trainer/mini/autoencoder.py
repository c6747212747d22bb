"""Train the f8 autoencoder, in the layout of TAESD, which ComfyUI's stock VAE loader detects."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..engine.schedule import cosine_rate, load_state, save_state
from .data import Emoji, draw_crops

LATENT_SCALE = 0.18215  # SD-2.1's latent format multiplies the encoder's output by this


WIDTHS = (24, 32, 64, 64)  # channels at full, 1/2, 1/4 and 1/8 resolution; TAESD has 64 everywhere


class Autoencoder(nn.Module):
    """TAESD built from ComfyUI's own blocks, but narrow at high resolution, where nearly all of the cost is."""

    def __init__(self, latent_channels: int = 4):
        super().__init__()
        from comfy.taesd.taesd import Block, Clamp, conv

        full, half, quarter, eighth = WIDTHS
        encoder = [conv(3, full), Block(full, full)]
        for wide, narrow in ((full, half), (half, quarter), (quarter, eighth)):
            encoder += [conv(wide, narrow, stride=2, bias=False), *(Block(narrow, narrow) for _ in range(3))]
        decoder = [Clamp(), conv(latent_channels, eighth), nn.ReLU()]
        for narrow, wide in ((eighth, quarter), (quarter, half), (half, full)):
            decoder += [
                *(Block(narrow, narrow) for _ in range(3)),
                nn.Upsample(scale_factor=2),
                conv(narrow, wide, bias=False),
            ]
        self.taesd_encoder = nn.Sequential(*encoder, conv(eighth, latent_channels))
        self.taesd_decoder = nn.Sequential(*decoder, Block(full, full), conv(full, 3))
        self.register_buffer("vae_scale", torch.tensor(1.0))
        self.register_buffer("vae_shift", torch.tensor(0.0))
        self.apply(start_convolution)
        for block in (m for m in self.modules() if isinstance(m, Block)):
            block.conv[4].weight.data.mul_(0.1)  # 20 residual blocks in a row must not blow up at the start


def start_convolution(module: nn.Module) -> None:
    """He initialisation, zero bias."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def widen(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function in TAESD's stock widths: channels padded with zeros stay zero through convolution and ReLU."""
    from comfy.taesd.taesd import TAESD

    wide = {name: torch.zeros_like(tensor) for name, tensor in TAESD().state_dict().items()}
    for name, tensor in state.items():
        wide[name][tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of colours plus that of horizontal and vertical edges; both (B, 3, H, W)."""
    loss = F.l1_loss(output, target)
    for dim in (2, 3):
        loss = loss + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def train_autoencoder(emoji: Emoji, work: Path, steps: int, batch: int = 32, crop: int = 64) -> nn.Module:
    """Train for `steps` batches of crops; resumes from `work/autoencoder.pt`, returns it when finished."""
    torch.manual_seed(0)
    path, model = work / "autoencoder.pt", Autoencoder().to(memory_format=torch.channels_last)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.98), fused=True)
    first = 0
    if state := load_state(path):
        model.load_state_dict(state["model"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="autoencoder", disable=first >= steps)
    for step in bar:
        rng = random.Random(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine_rate(step, steps)
        images = draw_crops(emoji, rng, batch, crop).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.taesd_encoder(images)
            noisy = latents + 0.05 * torch.randn_like(latents)  # neighbouring latents decode alike
            output = model.taesd_decoder(noisy)
        loss = reconstruction_loss(output.float(), images) + 1e-3 * latents.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    if first < steps:
        fit_scale(model, emoji)
        save_state(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps})
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def fit_scale(model: nn.Module, emoji: Emoji) -> None:
    """Set TAESD's scale and shift so that latents, as the UNet sees them, have mean 0 and variance 1."""
    latents = model.taesd_encoder(draw_crops(emoji, random.Random(-1), 128, 128))
    model.vae_scale.copy_(latents.std() * LATENT_SCALE)
    model.vae_shift.copy_(-latents.mean() / model.vae_scale)


@torch.inference_mode()
def encode(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> latents as the UNet sees them, (B, 4, H/8, W/8)."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.taesd_encoder(images.contiguous(memory_format=torch.channels_last)).float()
    return (latents / model.vae_scale + model.vae_shift) * LATENT_SCALE


@torch.inference_mode()
def decode(model: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the UNet sees them -> pictures (B, 3, H, W) in [0, 1]."""
    return model.taesd_decoder((latents / LATENT_SCALE - model.vae_shift) * model.vae_scale).clamp(0, 1)
