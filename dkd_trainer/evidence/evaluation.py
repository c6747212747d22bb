"""What is measured of one subject, picture by picture: its prediction error by timestep, and what it draws."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dha.fidelity import psnr, ssim

from ..diffusion import TIME_BANDS, add_noise, sample_euler, to_noise
from ..host import Teacher
from .held_out import HeldOut, to_bytes
from .subject import Running, Subject

SHOWN = 12  # pictures of each subject that are kept for the sheet


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; Euler's method, `cfg` the guidance scale, `precision` that of the UNet (`PRECISIONS`)."""

    steps: int = 25
    cfg: float = 4.0
    batch: int = 32
    precision: str = "fp32"


@torch.inference_mode()
def predict_bands(running: Running, held_out: HeldOut, device: torch.device, draw: int = 0, batch: int = 32) -> Tensor:
    """Predictions (bands, n, 4, h, w) at a random timestep of each band; noise and timesteps are the same for all."""
    running.draw_anew(draw)
    generator = torch.Generator().manual_seed(5)
    bands = []
    for low, high in TIME_BANDS:
        t = torch.randint(low, high, (len(held_out),), generator=generator)
        noisy = add_noise(held_out.latents, torch.randn(held_out.latents.shape, generator=generator), t)
        chunks = zip(noisy.split(batch), t.split(batch), held_out.context.split(batch), strict=True)
        bands.append(torch.cat([running.predict(*(part.to(device) for part in chunk)).cpu() for chunk in chunks]))
    return torch.stack(bands)


@torch.inference_mode()
def draw_latents(teacher: Teacher, running: Running, held_out: HeldOut, sampling: Sampling) -> Tensor:
    """Latents (n, 4, h, w) of every prompt; noise and guidance are the same for subjects of one seed."""
    running.draw_anew(0)
    subject = running.subject
    noise = torch.randn(held_out.latents.shape, generator=torch.Generator().manual_seed(subject.seed))
    drawn = []
    for start in tqdm(range(0, len(noise), sampling.batch), desc=subject.name, leave=False):
        context = held_out.context[start : start + sampling.batch]
        both = torch.cat([context, held_out.empty.expand_as(context)]).to(teacher.device)

        def predict(x, t, both=both):
            doubled, times = torch.cat([x, x]), torch.cat([t, t])
            prediction = running.predict(doubled, times.to(x.device), both)
            cond, empty = to_noise(prediction, doubled, times, teacher.prediction).chunk(2)
            return empty + sampling.cfg * (cond - empty)

        noisy = noise[start : start + sampling.batch].to(teacher.device)
        drawn.append(sample_euler(predict, noisy, subject.steps or sampling.steps).cpu())
    return torch.cat(drawn)


@torch.inference_mode()
def decode_pictures(teacher: Teacher, latents: Tensor, batch: int = 16) -> Tensor:
    """Latents (n, 4, h, w) -> pictures (n, 3, H, W) as saved, uint8."""
    parts = [to_bytes(teacher.decode_latents(part.to(teacher.device))).cpu() for part in latents.split(batch)]
    return torch.cat(parts).clone()


def measure_subject(
    teacher: Teacher,
    subject: Subject,
    held_out: HeldOut,
    sampling: Sampling,
    judges: dict,
    reference: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All that is measured of a subject, by name, first dimension n; `reference` is the teacher's, None for itself.

    `judges` are functions of pictures, see `list_judges` in `dkd_trainer.evidence.judges`.
    """
    running = Running(teacher, subject, held_out.latents.shape[-1], sampling.precision)
    measured: dict[str, Tensor] = {}
    if reference is None:
        measured["predictions"] = predict_bands(running, held_out, teacher.device)
    elif not subject.is_teacher:
        expected = reference["predictions"]
        first, second = (predict_bands(running, held_out, teacher.device, draw) - expected for draw in (0, 1))
        measured["error"] = first.square().sum((2, 3, 4)).T.contiguous()
        measured["lasting"] = (first * second).sum((2, 3, 4)).T.contiguous()
        measured["energy"] = expected.square().sum((2, 3, 4)).T.contiguous()
    measured["latents"] = draw_latents(teacher, running, held_out, sampling)
    pictures = decode_pictures(teacher, measured["latents"])
    measured["pictures"] = pictures if reference is None else pictures[:SHOWN].clone()
    return measured | judge_pictures(pictures, measured["latents"], held_out.prompts, judges, reference)


def judge_pictures(
    pictures: Tensor, latents: Tensor, prompts: list[str], judges: dict, reference: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """What the pictures (n, 3, H, W) show, and how far they are from the reference's with the same number."""
    measured = {}
    shown = pictures.float() / 255
    for name, judge in judges["alone"].items():
        measured[name] = torch.cat([judge(shown[i : i + 32], prompts[i : i + 32]) for i in range(0, len(shown), 32)])
    if reference is None:
        return measured
    other = reference["pictures"].float() / 255
    for name, judge in {"psnr": psnr, "ssim": ssim, **judges["pairs"]}.items():
        measured[name] = torch.cat([judge(a, b).float() for a, b in zip(shown.split(32), other.split(32), strict=True)])
    for name, judge in judges["latents"].items():
        measured[f"{name}_error"], measured[f"{name}_energy"] = judge(latents, reference["latents"])
    return measured
