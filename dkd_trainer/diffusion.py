"""SD-2.1's noise schedule, its training targets and a plain Euler sampler."""

from functools import cache

import torch

CPU = torch.device("cpu")
TIME_BANDS = ((0, 100), (100, 300), (300, 600), (600, 1000))  # detail is decided in the first, composition in the last


@cache
def alphas_cumprod(device: torch.device = CPU) -> torch.Tensor:
    """Signal power per timestep (1000,), SD's scaled-linear schedule; computed once for a device."""
    with torch.inference_mode(False):  # it outlives the forward that asks first
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        return (1 - betas).cumprod(0).float().to(device)


def signal_power(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """a_t (B, 1, 1, 1) of integer timesteps t (B,), on the device of `like`; looked up where t is."""
    return alphas_cumprod(t.device)[t].view(-1, 1, 1, 1).to(like.device)


def noise_levels(t: torch.Tensor) -> torch.Tensor:
    """Sigmas (B,) of integer timesteps t (B,), as ComfyUI counts noise: sqrt((1 - a_t) / a_t)."""
    a = alphas_cumprod(t.device)[t.long()]
    return ((1 - a) / a).sqrt()


def add_noise(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, all (B, 4, h, w); t (B,) integers."""
    a = signal_power(t, latents)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def shift_timesteps(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Integers t (B,) from 0 to 999 moved towards the noise: s t / (1 + (s - 1) t) of 1 (arXiv 2403.03206, eq. 23)."""
    part = (t.double() + 0.5) / 1000
    return (1000 * shift * part / (1 + (shift - 1) * part)).long()


def training_target(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, kind: str) -> torch.Tensor:
    """What the model should predict: the noise (`eps`) or v = sqrt(a) e - sqrt(1 - a) x_0 (arXiv 2202.00512)."""
    if kind == "eps":
        return noise
    a = signal_power(t, latents)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def to_noise(prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, kind: str) -> torch.Tensor:
    """The noise that a prediction of either kind implies, all (B, 4, h, w)."""
    if kind == "eps":
        return prediction
    a = signal_power(t, noisy)
    return a.sqrt() * prediction + (1 - a).sqrt() * noisy


@torch.inference_mode()
def sample_euler(predict, noise: torch.Tensor, steps: int = 25) -> torch.Tensor:
    """Euler's method on the probability-flow ODE; `predict(x_t, t (B,)) -> e`, noise and result (B, 4, h, w)."""
    timesteps = torch.linspace(999, 0, steps + 1)[:-1].round().long()
    levels = torch.cat([noise_levels(timesteps), torch.zeros(1)])
    x = noise * levels[0]
    for i, t in enumerate(timesteps):
        eps = predict(x / (levels[i] ** 2 + 1).sqrt(), t.repeat(len(x)))
        x = x + (levels[i + 1] - levels[i]) * eps
    return x
