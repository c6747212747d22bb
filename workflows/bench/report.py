"""The bench's findings as JSON, as Markdown and as a plain bar chart; each file is replaced whole or not at all."""

import io
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..machine import name_processor, read_commit
from .timing import Record, SizeResult

FORMAT = "dha-speed-bench"
ROW, MARGIN, LABELS, BARS = 24, 12, 240, 520
COLOURS = {"dha": "#c2410c", "student": "#ea7a3c", "ceiling": "#d4d4d4"}


@dataclass
class Run:
    """A run so far: where, with which settings, what came out by size; `complete` once all sizes are done."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    results: list[SizeResult]
    complete: bool = False


def describe_spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "min": min(values), "max": max(values), "q1": low, "q3": high}


def summarise_record(record: Record, unpatched: Record) -> dict[str, Any]:
    """A subject's figures; its ratios are those of laps of the same round."""
    ratios = [base / own for base, own in zip(unpatched.seconds, record.seconds, strict=True)]
    return {
        "name": record.name,
        "title": record.title,
        "seconds_per_step": describe_spread(record.seconds),
        "ratio_to_unpatched": describe_spread(ratios),
        "attention_pairs": record.pairs,
        "attention_pairs_share": record.pairs / unpatched.pairs,
        "relative_difference_to_unpatched": record.difference,
        "peak_memory_bytes": record.peak_memory,
        "step_memory_bytes": record.step_memory,
        "warm_up_seconds": record.warm_up_seconds,
        "laps_seconds_per_step": record.seconds,
    }


def summarise(run: Run) -> dict[str, Any]:
    """The JSON document."""
    sizes = [
        {
            "width": result.size.width,
            "height": result.size.height,
            "tokens": result.size.tokens,
            "rounds": len(result.records[0].seconds),
            "steps_per_lap": result.steps_per_lap,
            "subjects": [summarise_record(record, result.records[0]) for record in result.records],
        }
        for result in run.results
    ]
    return {
        "format": FORMAT,
        "version": 1,
        "complete": run.complete,
        "machine": run.machine,
        "settings": run.settings,
        "sizes": sizes,
    }


def describe_machine(device: torch.device, comfyui: str, command: str) -> dict[str, Any]:
    """Hardware, versions and commit; the load average says how quiet the machine was before the run."""
    cuda = device.type == "cuda"
    return {
        "processor": name_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "comfyui": comfyui,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": read_commit(),
        "command": command,
    }


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: a crash leaves the old one or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_report(out: Path, stem: str, run: Run) -> dict[str, Any]:
    """Write `stem`.json, .md and .png into a folder; the JSON document is also returned."""
    document = summarise(run)
    write_whole(out / f"{stem}.json", json.dumps(document, indent=1, allow_nan=False).encode())
    write_whole(out / f"{stem}.md", write_markdown(document).encode())
    write_whole(out / f"{stem}.png", draw_chart(document))
    return document


def write_markdown(document: dict[str, Any]) -> str:
    """Set-up in words, then one table a size."""
    machine, settings = document["machine"], document["settings"]
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        "# Time of one UNet step inside ComfyUI",
        "",
        f"{settings['weights']}, {settings['dtype']}, batch {settings['batch']}, on {where}; ComfyUI "
        f"{machine['comfyui']}, torch {machine['torch']}, commit {machine['commit']}.",
        "",
        "All subjects in one process, in turn, round by round after one uncounted step each. Times are medians over "
        "rounds; the speed-up is the median of the rounds' ratios to the unpatched model, quartiles and extremes "
        "beside it. Key pairs: query-key pairs of all attentions of a step against the unpatched model's. "
        f"{settings['note']}",
        "",
        f"`{machine['command']}`",
        *([] if document["complete"] else ["", "**This run was not finished.**"]),
    ]
    for size in document["sizes"]:
        laps = f"rounds {size['rounds']}, steps a round {size['steps_per_lap']}"
        lines += ["", f"## {size['width']}x{size['height']} (tokens {size['tokens']}, {laps})", ""]
        lines += tabulate(size["subjects"])
    return "\n".join(lines) + "\n"


def tabulate(subjects: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table; the memory column only where memory was measured."""
    measured = any(subject["peak_memory_bytes"] is not None for subject in subjects)
    head = ["subject", "s/step", "min..max", "speed-up", "quartiles", "min..max", "key pairs"]
    rows = [[*head, "peak GB"] if measured else head]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for subject in subjects:
        seconds, ratio = subject["seconds_per_step"], subject["ratio_to_unpatched"]
        row = [
            subject["title"],
            f"{seconds['median']:.4g}",
            f"{seconds['min']:.4g}..{seconds['max']:.4g}",
            f"{ratio['median']:.2f}x",
            f"{ratio['q1']:.2f}..{ratio['q3']:.2f}",
            f"{ratio['min']:.2f}..{ratio['max']:.2f}",
            f"{subject['attention_pairs_share']:.1%}",
        ]
        rows.append([*row, f"{subject['peak_memory_bytes'] / 1e9:.2f}"] if measured else row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def draw_chart(document: dict[str, Any]) -> bytes:
    """A PNG with one bar a subject, as long as its speed-up; a whisker from the slowest to the fastest round."""
    rows = [(size, subject) for size in document["sizes"] for subject in size["subjects"]]
    height = 2 * MARGIN + ROW * (len(rows) + len(document["sizes"]))
    picture = Image.new("RGB", (LABELS + BARS + 2 * MARGIN, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    scale = 0.85 * BARS / max((subject["ratio_to_unpatched"]["max"] for _, subject in rows), default=1.0)
    top, last = MARGIN, None
    for size, subject in rows:
        if size is not last:
            title = f"{size['width']}x{size['height']}: speed-up of a UNet step, {document['settings']['dtype']}"
            pen.text((MARGIN, top + 4), title, "black", font)
            top, last = top + ROW, size
        ratio, centre = subject["ratio_to_unpatched"], top + ROW // 2
        colour = COLOURS.get(subject["name"].split("-")[0], "#64748b")
        pen.text((MARGIN, top + 3), subject["name"], "black", font)
        pen.rectangle((LABELS, top + 3, LABELS + ratio["median"] * scale, top + ROW - 4), colour)
        pen.line((LABELS + ratio["min"] * scale, centre, LABELS + ratio["max"] * scale, centre), "black", 1)
        pen.text((LABELS + ratio["max"] * scale + 6, top + 3), f"{ratio['median']:.2f}x", "black", font)
        top += ROW
    pen.line((LABELS + scale, MARGIN, LABELS + scale, height - MARGIN), "#94a3b8", 1)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
