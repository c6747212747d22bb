"""Sampling as the core KSampler does it, timed and weighed without loading, text encoding or decoding."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ..dha.peak import watch_peak
from ..dha.stopwatch import synchronise

WARM_UP = 3  # steps: the schedule's first, one of the second half, and its last
LATE = 0.7  # share of the schedule that no preset of Apply DHA treats as its beginning or its end


@dataclass
class Laps:
    """What a timed model has done: seconds of every run, and bytes; while it warms up memory is measured, not time."""

    weights: int
    is_warm: bool = False
    peak_memory: int = 0
    seconds: list[float] = field(default_factory=list)
    steps: int = 0

    def report(self) -> dict[str, float]:
        """Median seconds of a run and of one of its steps, zeros when there was nothing to sample, and bytes.

        `peak_memory` is what a step takes beyond `weights`.
        """
        seconds = median(self.seconds) if self.seconds else 0.0
        bytes = {"peak_memory": self.peak_memory, "weights": self.weights}
        return {"seconds": seconds, "seconds_per_step": seconds / max(self.steps, 1), **bytes}


def count_weights(model) -> int:
    """Bytes of a model patcher's weights, with those of the models that come with it, such as a student."""
    models = [model, *(other for others in model.additional_models.values() for other in others)]
    return sum(each.model_size() for each in models)


def attach_stopwatch(model) -> tuple[object, Laps]:
    """A clone of a ModelPatcher that samples the same and writes down the time each run took.

    The clock runs around the sampler alone: ComfyUI has loaded and patched the weights before that, so changing over
    from one model to the other is not counted.
    """
    laps = Laps(count_weights(model))
    timed = model.clone()

    def measure(executor, guider, sigmas, *args, **kwargs):
        if not laps.is_warm:
            with watch_peak(model.load_device) as peak:
                samples = executor(guider, sigmas, *args, **kwargs)
            laps.peak_memory, laps.is_warm = peak.bytes, True
            return samples
        synchronise(model.load_device)
        start = time.perf_counter()
        samples = executor(guider, sigmas, *args, **kwargs)
        synchronise(model.load_device)
        laps.seconds.append(time.perf_counter() - start)
        laps.steps = len(sigmas) - 1
        return samples

    timed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "dha_stopwatch", measure)
    return timed, laps


@dataclass(frozen=True)
class Sampling:
    """KSampler's settings."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list
    negative: list
    denoise: float

    def find_levels(self, model) -> torch.Tensor:
        """The noise levels (steps + 1,) that KSampler goes through."""
        settings = (self.sampler_name, self.scheduler, self.denoise, model.model_options)
        return comfy.samplers.KSampler(model, self.steps, model.load_device, *settings).sigmas

    def run(self, model, latent: dict, callback, levels: torch.Tensor | None = None) -> torch.Tensor:
        """Sample as the core KSampler does, or through other noise `levels` (steps + 1,); (B, C, H, W)."""
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        # Drawn anew for every run: it seeds the global generator too, which some samplers draw from.
        noise = comfy.sample.prepare_noise(samples, self.seed, latent.get("batch_index"))
        return comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            samples,
            denoise=self.denoise,
            noise_mask=latent.get("noise_mask"),
            sigmas=levels,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )


def count_steps(sampling: Sampling, models: int, repeats: int) -> int:
    """By how much `time_both` advances its progress bar."""
    return models * (min(WARM_UP, sampling.steps) + repeats * sampling.steps)


def warm_up(sampling: Sampling, model, latent: dict, callback) -> None:
    """The first and the last step of a sampling and one between them, or all where there are no more.

    Apply DHA has more keys in the second half and may leave the last steps exact: they take more memory, and under
    torch.compile are code of their own. First and last have to be those of this very schedule: with fewer steps many a
    scheduler ends at another noise level.
    """
    levels = sampling.find_levels(model)
    if len(levels) > WARM_UP + 1:
        # One of the schedule's own between them: some samplers divide by the way from one level to the next.
        between, late = levels[1:-2], model.get_model_object("model_sampling").percent_to_sigma(LATE)
        middle = (between - float(late)).abs().argmin()
        levels = torch.cat([levels[:1], between[middle : middle + 1], levels[-2:]])
    sampling.run(model, latent, callback, levels)


def time_both(
    sampling: Sampling, models: dict[str, Any], latent: dict, repeats: int, progress: comfy.utils.ProgressBar
) -> tuple[dict[str, torch.Tensor], dict[str, Laps]]:
    """Run the models in turn `repeats` times; their samples and their laps by name.

    Before that each takes its `warm_up` uncounted.
    """
    watched = {name: attach_stopwatch(model) for name, model in models.items()}

    # No preview: it would be timed. The update is where ComfyUI stops the run when the user cancels.
    def advance(step, denoised, noisy, total):
        progress.update(1)

    for timed, _ in watched.values():
        warm_up(sampling, timed, latent, advance)
    samples = {}
    for _ in range(repeats):
        for name, (timed, _) in watched.items():
            samples[name] = sampling.run(timed, latent, advance)
    return samples, {name: laps for name, (_, laps) in watched.items()}
