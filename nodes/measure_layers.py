"""DHA Measure Layers: finds out which layers a short context makes faster on this device, for `levels = auto`."""

from dataclasses import asdict
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..dha.payoff import WORTH
from ..dha.presets import PRESETS
from ..dha.sites import read_architecture
from .benchmark import read_sizes
from .layer_times import ROUNDS, LayerTime, draw_tokens, find_layers, make_students, time_layer
from .no_room import spare_memory
from .payoff import find_precision, keep_rows, name_precision
from .tables import Table, show_number, show_report

NAME = "DHA Measure Layers"
LEVEL_NAMES = ("finest", "second", "third")


class MeasureLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHAMeasureLayers",
            display_name=NAME,
            category="DHA",
            description="Run once on your machine: times single layers of the model as they are and with DHA, and "
            "keeps which of them get faster at which size. Apply DHA with levels = auto then goes by your device "
            "instead of by the one that came with the pack.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 2.0 or 2.1 model, from a loader."),
                io.String.Input(
                    "sizes",
                    default="384, 512, 768, 1024",
                    tooltip="Picture sizes in pixels, multiples of 8, with commas between them. A size between two of "
                    "them is judged by the smaller one, below the smallest nothing is changed.",
                ),
                io.Int.Input(
                    "pictures",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Pictures in one pass of the model: with a cfg above 1 every picture counts twice.",
                ),
            ],
            outputs=[io.String.Output("report", display_name="report", tooltip="All figures as JSON.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # so that queueing it again measures again

    @classmethod
    def execute(cls, model, sizes, pictures) -> io.NodeOutput:
        wanted = read_sizes(sizes, NAME)
        found = measure(model, wanted, pictures)
        dtype = name_precision(model)
        timed = [entry for entry in found if entry["speedup"] is not None]
        rows = [[each["channels"], each["tokens"], each["share"], round(each["speedup"], 4)] for each in timed]
        origin = {"torch": torch.__version__, "pictures": pictures}
        file = keep_rows(model, dtype, rows, origin)
        device = comfy.model_management.get_torch_device_name(model.load_device)
        report = {"device": device, "dtype": dtype, **origin, "kept_in": file.name, "layers": found}
        text, shown = show_report(report, summarise(found), tabulate(found))
        return io.NodeOutput(text, ui=shown)


def measure(model, sizes: list[tuple[int, int]], pictures: int) -> list[dict[str, Any]]:
    """An entry for each level, size and share of keys; a layer that does not fit into the memory has no speed-up."""
    architecture = read_architecture(model.model.diffusion_model.state_dict())
    comfy.model_management.load_models_gpu([model])
    device, dtype = model.load_device, find_precision(model)
    students = make_students(architecture, device, dtype)
    layers = [(size, layer) for size in sizes for layer in find_layers(*size)]
    progress = comfy.utils.ProgressBar(len(layers) * (ROUNDS + 1))
    found = []
    for number, ((width, height), layer) in enumerate(layers, 1):
        attention = model.model.diffusion_model.get_submodule(layer.site.name)
        times: list[LayerTime] = []
        with spare_memory():
            tokens = (part.to(device, dtype) for part in draw_tokens(layer, pictures, architecture))
            times = time_layer(attention, students, layer, *tokens, lambda: progress.update(1))
        progress.update_absolute(number * (ROUNDS + 1))
        labels = {"width": width, "height": height, "level": layer.site.level, "tokens": layer.tokens}
        labels["channels"] = architecture.channels[layer.site.name]
        found += [{**labels, **asdict(time)} for time in times]
    return found


def find_speedups(found: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the presets' first halves made of a layer, by size and level: `quality` and so on, and `seconds` before."""
    speedups: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in found:
        row = speedups.setdefault((f"{entry['width']}x{entry['height']}", LEVEL_NAMES[entry["level"]]), {})
        row["seconds"] = entry["seconds"]
        for name, preset in PRESETS.items():
            first = preset.stretches[0]
            if entry["share"] == first.find_share(entry["tokens"]):
                row[name] = entry["speedup"]
    return speedups


def tabulate(found: list[dict[str, Any]]) -> Table:
    """A row a layer for the browser."""
    rows = [["size", "level", "as it is", *PRESETS]]
    for labels, row in find_speedups(found).items():
        milliseconds = f"{1000 * row['seconds']:.3g} ms"
        rows.append([*labels, milliseconds, *(show_number(row.get(name), 2, "x") for name in PRESETS)])
    return rows


def summarise(found: list[dict[str, Any]]) -> str:
    """One line for the node: where auto will use the preset `balanced`."""
    paying: dict[str, list[str]] = {}
    for (size, level), row in find_speedups(found).items():
        paying.setdefault(size, [])
        if (row.get("balanced") or 0) >= WORTH:
            paying[size].append(level)
    if not paying:
        return "no layer fitted into the memory"
    return "kept; balanced pays at " + "; ".join(f"{s}: {', '.join(levels) or 'none'}" for s, levels in paying.items())
