"""Compare Models: the same prompt and seed through two models, how long each takes and how much memory."""

import math
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from .payoff import find_precision
from .tables import show_report, tabulate_runs
from .timing import Laps, Sampling, count_steps, time_both


def relate(student: torch.Tensor, original: torch.Tensor) -> float | None:
    """Norm of the difference over the norm of the original; None where that is no number."""
    ratio = ((student - original).float().norm() / original.float().norm()).item()
    return ratio if math.isfinite(ratio) else None


def describe_run(model, sampling: Sampling, samples: torch.Tensor, repeats: int) -> dict[str, Any]:
    """The settings that a figure needs beside it."""
    scale = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    return {
        "steps": sampling.steps,
        "width": samples.shape[-1] * scale,
        "height": samples.shape[-2] * scale,
        "batch": samples.shape[0],
        "cfg": sampling.cfg,
        "sampler": sampling.sampler_name,
        "scheduler": sampling.scheduler,
        "denoise": sampling.denoise,
        "seed": sampling.seed,
        "repeats": repeats,
        "device": str(model.load_device),
        "dtype": str(find_precision(model)).removeprefix("torch."),
    }


class CompareModels(io.ComfyNode):
    """Sample the same noise through two models and time both fairly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHACompareModels",
            display_name="Compare Models",
            category="DHA/compare",
            description="Samples the same prompt and seed through two models, as KSampler would, and times both: each "
            "model is warmed up with three steps that are not counted, the two take turns, and loading is not counted.",
            is_output_node=True,
            inputs=[
                io.Model.Input("original", tooltip="The model as it is; sampled exactly as KSampler samples it."),
                io.Model.Input("student", tooltip="The model to hold against it, for example from Apply DHA."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the noise that both models start from.",
                ),
                io.Int.Input("steps", default=25, min=1, max=10000, tooltip="Sampling steps of each run."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale, the same for both; 1 runs the positive prompt only.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The sampler, the same for both.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                    tooltip="The noise schedule, the same for both.",
                ),
                io.Conditioning.Input("positive", tooltip="What the pictures should show."),
                io.Conditioning.Input("negative", tooltip="What the pictures should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to start from: empty, encoded, or with a mask."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the latent is drawn anew; below 1 for image to image.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip="How often each model runs, in turn; it reports medians. Take 3 or more for firm figures.",
                ),
            ],
            outputs=[
                io.Latent.Output("original_latent", display_name="original", tooltip="What the original drew."),
                io.Latent.Output("student_latent", display_name="student", tooltip="What the student drew."),
                io.String.Output(
                    "report", display_name="report", tooltip="Seconds, memory and difference of the latents as JSON."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # so that queueing it again measures again

    @classmethod
    def execute(cls, original, student, latent_image, repeats: int = 1, **settings) -> io.NodeOutput:
        sampling, models = Sampling(**settings), {"original": original, "student": student}
        progress = comfy.utils.ProgressBar(count_steps(sampling, len(models), repeats))
        samples, laps = time_both(sampling, models, latent_image, repeats, progress)
        report = {
            **report_laps(laps),
            "relative_latent_difference": relate(samples["student"], samples["original"]),
            **describe_run(original, sampling, samples["original"], repeats),
        }
        text, shown = show_report(report, summarise(report), tabulate_runs(report))
        latents = [{**latent_image, "samples": samples[name]} for name in models]
        return io.NodeOutput(*latents, text, ui=shown)


def report_laps(laps: dict[str, Laps]) -> dict[str, Any]:
    """Each model's figures by name, and how many times as fast the student is."""
    report: dict[str, Any] = {name: lap.report() for name, lap in laps.items()}
    return report | {"speedup": report["original"]["seconds"] / max(report["student"]["seconds"], 1e-9)}


def summarise(report: dict[str, Any]) -> str:
    """One line for the node."""
    seconds = [f"{name} {report[name]['seconds']:.2f} s" for name in ("original", "student")]
    return f"{', '.join(seconds)}: {report['speedup']:.2f}x"
