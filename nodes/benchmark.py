"""DHA Benchmark: what a step takes at several sizes on this machine, with and without the student."""

import re
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from .compare import describe_run, report_laps
from .no_room import spare_memory
from .pixels import to_images
from .plot import draw_bars
from .tables import MISSING, Table, show_bytes, show_number, show_report
from .timing import Sampling, count_steps, time_both

SIZE = re.compile(r"(\d+)(?:\s*[x×]\s*(\d+))?")
STRIDE, SMALLEST, LARGEST = 8, 64, 8192  # pixels
PREVIEW = 512


class Benchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHABenchmark",
            display_name="DHA Benchmark",
            category="DHA/compare",
            description="Times the sampling of two models at several sizes on this machine, as a chart and a table. "
            "Both are warmed up at every size and take turns; loading is not counted, and nothing is decoded.",
            is_output_node=True,
            inputs=[
                io.Model.Input("original", tooltip="The model as it is, from a loader."),
                io.Model.Input("student", tooltip="The same model after Apply DHA."),
                io.Conditioning.Input("positive", tooltip="Any prompt; what it says does not change the time."),
                io.Conditioning.Input("negative", tooltip="Any prompt; not used where cfg is 1."),
                io.String.Input(
                    "sizes",
                    default="512, 768, 1024",
                    tooltip="Picture sizes in pixels, multiples of 8, with commas between them: 512 is square, "
                    "768x512 is 768 wide.",
                ),
                io.Int.Input(
                    "steps",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Steps of one timed run. With 10 or more the presets of Apply DHA show about the mean of "
                    "their steps, of which the first are the fastest; with the preset custom 1 is enough.",
                ),
                io.Int.Input(
                    "repeats",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="Timed runs of each model at each size; medians are shown.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale. Above 1 every step is two passes through the model, as when drawing.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures drawn at once."),
            ],
            outputs=[
                io.Image.Output("chart", display_name="chart", tooltip="Seconds a step by size."),
                io.String.Output("report", display_name="report", tooltip="All figures as JSON."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # so that queueing it again measures again

    @classmethod
    def execute(cls, original, student, positive, negative, sizes, steps, repeats, cfg, batch_size) -> io.NodeOutput:
        wanted = read_sizes(sizes, "DHA Benchmark")
        sampling = Sampling(0, steps, cfg, "euler", "normal", positive, negative, 1.0)
        models = {"original": original, "student": student}
        progress = comfy.utils.ProgressBar(len(wanted) * count_steps(sampling, len(models), repeats))
        report: dict[str, Any] = {"sizes": []}
        for number, (width, height) in enumerate(wanted, 1):
            latent = make_latent(width, height, batch_size)
            report["sizes"].append(time_size(sampling, models, latent, repeats, progress))
            done = number * progress.total // len(wanted)
            progress.update_absolute(done, preview=("JPEG", draw_chart(report, original), PREVIEW))
        settings = describe_run(original, sampling, latent["samples"], repeats)
        report |= {key: value for key, value in settings.items() if key not in ("width", "height", "seed")}
        text, shown = show_report(report, summarise(report), tabulate(report))
        chart = to_images([draw_chart(report, original)])
        return io.NodeOutput(chart, text, ui=shown | ui.PreviewImage(chart, cls=cls).as_dict())


def read_sizes(text: str, node: str) -> list[tuple[int, int]]:
    """Widths and heights from `512, 768x512`; raises ValueError, about a `node`, for anything else."""
    sizes = []
    for part in filter(None, (part.strip() for part in re.split("[,;\n]", text))):
        match = SIZE.fullmatch(part)
        size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if any(side % STRIDE or not SMALLEST <= side <= LARGEST for side in size):
            raise ValueError(
                f"{node} found {part!r} in sizes and expected pixels such as 512 or 768x512, multiples of {STRIDE} "
                f"from {SMALLEST} to {LARGEST}."
            )
        sizes.append(size)
    if not sizes:
        raise ValueError(f"{node} found no sizes; enter for example 512, 768, 1024.")
    return sizes


def make_latent(width: int, height: int, batch: int) -> dict[str, torch.Tensor]:
    """What Empty Latent Image makes."""
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(batch, 4, height // STRIDE, width // STRIDE, device=device)}


def time_size(sampling: Sampling, models, latent: dict, repeats: int, progress) -> dict[str, Any]:
    """One size's entry in the report; a size that does not fit into the memory says so."""
    height, width = (side * STRIDE for side in latent["samples"].shape[-2:])
    size = {"width": width, "height": height}
    with spare_memory():
        _, laps = time_both(sampling, models, latent, repeats, progress)
        return {**size, **report_laps(laps)}
    return {**size, "error": "out of memory"}


def draw_chart(report: dict[str, Any], model):
    device = comfy.model_management.get_torch_device_name(model.load_device)
    return draw_bars(report["sizes"], device)


def tabulate(report: dict[str, Any]) -> Table:
    """A row a size for the browser."""
    rows = [["size", "original s/step", "student s/step", "speed", "memory", "student's"]]
    for size in report["sizes"]:
        title = f"{size['width']}x{size['height']}"
        if "error" in size:
            rows.append([title, size["error"], MISSING, MISSING, MISSING, MISSING])
            continue
        sides = [size["original"], size["student"]]
        seconds = [show_number(side["seconds_per_step"], 3) for side in sides]
        memory = [show_bytes(side["peak_memory"]) for side in sides]
        rows.append([title, *seconds, show_number(size["speedup"], 2, "x"), *memory])
    return rows


def summarise(report: dict[str, Any]) -> str:
    """One line for the node."""
    timed = [size for size in report["sizes"] if "speedup" in size]
    found = [f"{size['width']}x{size['height']}: {size['speedup']:.2f}x" for size in timed]
    return ", ".join(found) or "no size fitted into the memory"
