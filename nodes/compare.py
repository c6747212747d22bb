"""The same prompt and seed through two models: how long each takes, and how far apart the pictures are."""

import json
import math
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from .timing import Sampling, time_both

HEAT = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.74, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))


def relate(student: torch.Tensor, original: torch.Tensor) -> float | None:
    """Norm of the difference over the norm of the original; None where that is no number."""
    ratio = ((student - original).float().norm() / original.float().norm()).item()
    return ratio if math.isfinite(ratio) else None


def describe_run(model, sampling: Sampling, samples: torch.Tensor, repeats: int) -> dict[str, Any]:
    """The settings that a figure needs beside it."""
    scale = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    inference = getattr(model.model, "manual_cast_dtype", None) or model.model.get_dtype()
    return {
        "steps": sampling.steps,
        "width": samples.shape[-1] * scale,
        "height": samples.shape[-2] * scale,
        "batch": samples.shape[0],
        "cfg": sampling.cfg,
        "sampler": sampling.sampler_name,
        "scheduler": sampling.scheduler,
        "seed": sampling.seed,
        "repeats": repeats,
        "device": str(model.load_device),
        "dtype": str(inference).removeprefix("torch."),
    }


class CompareModels(io.ComfyNode):
    """Sample the same noise through two models and time both fairly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompareModels",
            display_name="Compare Models",
            category="DHA",
            description="Samples the same prompt and seed through two models, as KSampler would, and times both: each "
            "model is warmed up with one step that is not counted, and loading is not counted either.",
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
                io.Latent.Output("original_latent", display_name="original"),
                io.Latent.Output("student_latent", display_name="student"),
                io.String.Output("report", display_name="report", tooltip="Seconds and difference as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, original, student, latent_image, repeats: int = 1, **settings) -> io.NodeOutput:
        sampling = Sampling(**settings)
        samples, laps = time_both(sampling, {"original": original, "student": student}, latent_image, repeats)
        report = {name: lap.report() for name, lap in laps.items()}
        speedup = report["original"]["seconds"] / max(report["student"]["seconds"], 1e-9)
        report |= {
            "speedup": speedup,
            "relative_latent_difference": relate(samples["student"], samples["original"]),
            **describe_run(original, sampling, samples["original"], repeats),
        }
        text = json.dumps(report, indent=1)
        show_text(
            cls.hidden.unique_id,
            f"original {report['original']['seconds']:.2f} s, student {report['student']['seconds']:.2f} s: "
            f"{speedup:.2f}x",
        )
        latents = [{**latent_image, "samples": samples[name]} for name in ("original", "student")]
        return io.NodeOutput(*latents, text, ui=ui.PreviewText(text))


def measure_difference(original: torch.Tensor, student: torch.Tensor) -> dict[str, Any]:
    """PSNR in dB and mean absolute difference of pictures in 0..1, (B, H, W, C); None where there is no number."""
    difference = (student - original).float()
    squared, absolute = difference.square().mean().item(), difference.abs().mean().item()
    return {
        "psnr": -10 * math.log10(squared) if squared > 0 else None,
        "identical": squared == 0,
        "mean_absolute_difference": absolute if math.isfinite(absolute) else None,
    }


def colour_heat(values: torch.Tensor) -> torch.Tensor:
    """Black, purple, red, orange, pale yellow for 0..1; (B, H, W) to (B, H, W, 3)."""
    stops = torch.tensor(HEAT, device=values.device)
    position = values.clamp(0, 1) * (len(HEAT) - 1)
    below = position.long().clamp(max=len(HEAT) - 2)
    return torch.lerp(stops[below], stops[below + 1], (position - below)[..., None])


def check_alike(original: torch.Tensor, student: torch.Tensor) -> None:
    """Raises ValueError unless both batches hold as many pictures of the same size."""
    if original.shape[:3] != student.shape[:3]:
        found = [f"{count} of {width}x{height}" for count, height, width in (original.shape[:3], student.shape[:3])]
        raise ValueError(
            f"Compare Pictures found pictures of different sizes or counts: original {found[0]}, student {found[1]}. "
            "It expects both alike; connect the two outputs of the same Compare Models, each through VAE Decode."
        )


def read_report(report: str | None) -> dict[str, Any]:
    """The fields of Compare Models' report; raises ValueError where it is something else."""
    try:
        fields = json.loads(report) if report else {}
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(
            f"Compare Pictures found {report[:40]!r} as report and expected a JSON object; "
            "connect the report output of Compare Models, or nothing."
        )
    return fields


class ComparePictures(io.ComfyNode):
    """Put two pictures and their difference side by side and measure it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ComparePictures",
            display_name="Compare Pictures",
            category="DHA",
            description="Original, student and their amplified difference side by side, with PSNR.",
            is_output_node=True,
            inputs=[
                io.Image.Input("original", tooltip="The original model's picture; shown on the left."),
                io.Image.Input("student", tooltip="The student's picture of the same size; shown in the middle."),
                io.Float.Input(
                    "amplify",
                    default=4.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="Gain of the difference on the right: at 4, a quarter of full brightness is the hottest.",
                ),
                io.String.Input(
                    "report",
                    optional=True,
                    force_input=True,
                    tooltip="The report of Compare Models; its seconds are put beside the difference.",
                ),
            ],
            outputs=[
                io.Image.Output("comparison", display_name="comparison", tooltip="Original | student | difference."),
                io.String.Output("text", display_name="report", tooltip="Difference and seconds as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, original, student, amplify: float, report: str | None = None) -> io.NodeOutput:
        check_alike(original, student)
        original, student = original[..., :3], student[..., :3].to(original)
        fields = measure_difference(original, student) | read_report(report)
        heat = colour_heat((student - original).abs().mean(-1) * amplify).to(original)
        comparison = torch.cat([original, student, heat], dim=2)
        text = json.dumps(fields, indent=1)
        show_text(cls.hidden.unique_id, summarise(fields))
        preview = ui.PreviewImage(comparison, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(comparison, text, ui=preview)


def summarise(fields: dict[str, Any]) -> str:
    """One line for the node."""
    if fields["psnr"] is not None:
        parts = [f"PSNR {fields['psnr']:.1f} dB"]
    else:
        parts = ["identical" if fields["identical"] else "one of the pictures holds values that are no numbers"]
    if "speedup" in fields:
        parts.append(f"{fields['speedup']:.2f}x as fast at {fields['width']}x{fields['height']}")
    return ", ".join(parts)


def show_text(node_id: str, text: str) -> None:
    """Write a line on the node in the browser."""
    PromptServer.instance.send_progress_text(text, node_id)
