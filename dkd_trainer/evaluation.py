"""How close a student is to its teacher: prediction error per timestep band, pictures of the same seed."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .diffusion import add_noise, sample_euler, to_noise
from .host import Teacher
from .metrics.kernel_distance import estimate_distance
from .metrics.pictures import psnr, ssim

BANDS = (
    (0, 100),
    (100, 300),
    (300, 600),
    (600, 1000),
)  # timesteps; detail is decided in the first, composition in the last


@dataclass(frozen=True)
class Subject:
    """A named way to run the teacher's UNet: patches in `options`, `steps` of the sampler."""

    name: str
    options: dict = field(default_factory=dict)
    steps: int = 25


@torch.inference_mode()
def measure_errors(teacher: Teacher, subject: Subject, pairs: dict[str, Tensor], batch: int = 32) -> dict[str, float]:
    """Relative error |e_s - e_t| / |e_t| of the prediction, per band of timesteps and as their `mean`."""
    generator = torch.Generator().manual_seed(5)
    errors = {}
    for low, high in BANDS:
        difference = energy = 0.0
        for start in range(0, len(pairs["latents"]), batch):
            latents = pairs["latents"][start : start + batch].float()
            context = pairs["context"][start : start + batch].float()
            t = torch.randint(low, high, (len(latents),), generator=generator)
            noisy = add_noise(latents, torch.randn(latents.shape, generator=generator), t)
            moved = [a.to(teacher.device) for a in (noisy, t, context)]
            expected, found = teacher.predict(*moved), teacher.predict(*moved, subject.options)
            difference += (found - expected).square().sum().item()
            energy += expected.square().sum().item()
        errors[f"{low}-{high}"] = (difference / energy) ** 0.5
    errors["mean"] = sum(errors.values()) / len(BANDS)
    return errors


@torch.inference_mode()
def draw_pictures(
    teacher: Teacher, subject: Subject, pairs: dict[str, Tensor], cfg: float = 4.0, batch: int = 32
) -> Tensor:
    """Pictures (n, 3, H, W) of every prompt of `pairs`; noise and guidance are the same for every subject."""
    noise = torch.randn(pairs["latents"].shape, generator=torch.Generator().manual_seed(11))
    pictures = []
    for start in tqdm(range(0, len(noise), batch), desc=subject.name, leave=False):
        context = pairs["context"][start : start + batch].float()
        both = torch.cat([context, pairs["empty"].float().expand_as(context)]).to(teacher.device)

        def predict(x, t, both=both):
            doubled, times = torch.cat([x, x]), torch.cat([t, t]).to(x.device)
            prediction = teacher.predict(doubled, times, both, subject.options)
            cond, empty = to_noise(prediction, doubled, times.cpu(), teacher.prediction).chunk(2)
            return empty + cfg * (cond - empty)

        latents = sample_euler(predict, noise[start : start + batch].to(teacher.device), subject.steps)
        pictures.append(teacher.decode_latents(latents).cpu().clone())
    return torch.cat(pictures)


def compare_pictures(
    pictures: Tensor, reference: Tensor, real: Tensor, prompts: list[str], net, scorer
) -> dict[str, float]:
    """Median PSNR (dB), mean SSIM and perceptual distance to `reference`; KID x 1e3 to `real`; prompt score.

    `net` and `scorer` may be None, then what needs them is left out.
    """
    result = {"psnr": psnr(pictures, reference).median().item(), "ssim": ssim(pictures, reference).mean().item()}
    if net is not None:
        from .metrics.features import perceptual_distance, pool_features

        split = [slice(i, i + 32) for i in range(0, len(pictures), 32)]
        distances = [perceptual_distance(net, pictures[s], reference[s]) for s in split]
        result["perceptual"] = torch.cat(distances).mean().item()
        features, real_features = (torch.cat([pool_features(net, p[s]) for s in split]) for p in (pictures, real))
        estimate = estimate_distance(features, real_features)
        result["kid_x1e3"], result["kid_error_x1e3"] = 1e3 * estimate.mean, 1e3 * estimate.error
    if scorer is not None:
        scores = [scorer.score(pictures[i : i + 32], prompts[i : i + 32]) for i in range(0, len(pictures), 32)]
        result["prompt_score"] = torch.cat(scores).mean().item()
    return {name: None if value == float("inf") else value for name, value in result.items()}


def read_real(names: list[Path], size: int) -> Tensor:
    """Real pictures (n, 3, size, size) for KID."""
    from .pairs import read_picture

    return torch.stack([read_picture(name, size) for name in names])
