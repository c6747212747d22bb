"""What the demo found out, and its tables."""

from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from ..machine import Machine

QUALITY_NOTE = (
    "Quality: the mini SD-2.1 of this repository, the same architecture a tenth as wide, trained on emoji art. It "
    "draws 128x128 pictures. These figures say how close its student stays to it; they say nothing about the "
    "published SD-2.1."
)
SPEED_NOTE = (
    "Speed: the full-size SD-2.1 architecture with random weights, since the published weights are not part of this "
    "repository. Weights do not change the time of a step; the pictures would be noise and are not drawn. DHA runs "
    "training-free here (no student file), at its default preset. Timed is one step of the first half of a sampling, "
    "the sampler alone: no loading, text encoding or decoding. The preset's later steps have twice the keys, and its "
    "last ones are the original's."
)
MINI_SPEED_NOTE = (
    "The seconds beside the pictures are the mini model's: with 256 tokens self-attention costs next to nothing, so no "
    "gain is to be expected there."
)


@dataclass(frozen=True)
class Comparison:
    """One prompt through both models: the nodes' report and the pictures as PNG."""

    prompt: str
    report: dict[str, Any]
    original: bytes
    student: bytes
    comparison: bytes


@dataclass
class Results:
    """Everything the report is made of; `speed` is Compare Models' report, `speed_problem` says why there is none."""

    machine: Machine
    checkpoint: str
    student: str
    comparisons: list[Comparison] = field(default_factory=list)
    speed: dict[str, Any] | None = None
    speed_problem: str = ""

    def summarise(self) -> dict[str, Any]:
        """The JSON of the report."""
        return {
            "machine": asdict(self.machine),
            "quality": {
                "note": QUALITY_NOTE,
                "checkpoint": self.checkpoint,
                "student": self.student,
                "mean_psnr": self.average("psnr"),
                "mean_relative_latent_difference": self.average("relative_latent_difference"),
                "prompts": [{"prompt": item.prompt, **item.report} for item in self.comparisons],
            },
            "speed": {"note": SPEED_NOTE, "report": self.speed, "problem": self.speed_problem or None},
        }

    def average(self, key: str) -> float | None:
        """Mean of a figure over the prompts that have it."""
        values = [item.report[key] for item in self.comparisons if item.report[key] is not None]
        return mean(values) if values else None


def show(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_psnr(report: dict[str, Any]) -> str:
    return "identical" if report["identical"] else show(report["psnr"], 1)


def tabulate_quality(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows, one row a prompt and the mean."""
    head = ["prompt", "seed", "PSNR, dB", "mean difference", "latent difference", "original, s", "student, s"]
    rows = []
    for item in results.comparisons:
        report = item.report
        figures = [show(report["mean_absolute_difference"], 4), show(report["relative_latent_difference"], 3)]
        seconds = [show(report[side]["seconds"]) for side in ("original", "student")]
        rows.append([item.prompt, str(report["seed"]), show_psnr(report), *figures, *seconds])
    differences = [
        show(results.average("mean_absolute_difference"), 4),
        show(results.average("relative_latent_difference"), 3),
    ]
    return head, [*rows, ["mean", "", show(results.average("psnr"), 1), *differences, "", ""]]


def tabulate_speed(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and one row."""
    head = ["size", "original, s/step", "DHA, s/step", "speedup", "steps", "cfg", "batch", "repeats", "dtype", "device"]
    seconds = [show(report[side]["seconds_per_step"], 3) for side in ("original", "student")]
    settings = [str(report[key]) for key in ("steps", "cfg", "batch", "repeats", "dtype", "device")]
    size = f"{report['width']}x{report['height']}"
    return head, [[size, *seconds, f"{show(report['speedup'])}x", *settings]]


def describe_settings(results: Results) -> str:
    """Sampler and steps of the quality table in words."""
    report = results.comparisons[0].report
    return (
        f"{report['width']}x{report['height']}, {report['steps']} {report['sampler']} steps, scheduler "
        f"{report['scheduler']}, cfg {report['cfg']}, {report['dtype']} on {report['device']}; {results.checkpoint} "
        f"against the same with {results.student}"
    )
