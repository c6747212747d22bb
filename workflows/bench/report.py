"""The bench's findings as JSON, as Markdown and as a plain bar chart; each file is replaced whole or not at all."""

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from dha.whole_file import write_whole
from dkd_trainer.record import current_commit, name_processor

from .chart import draw_chart
from .contest import Record

FORMAT = "dha-speed-bench"
VERSION = 2
HEADINGS = {
    "step": "One UNet step",
    "picture": "A whole picture: sampling with guidance, decoding",
    "layer": "One self-attention",
    "profile": "Parts of one hybrid layer, each on its own",
}


@dataclass
class Result:
    """One contest; the first record is what the others are held against. `error` where it could not be set up."""

    kind: str
    labels: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    error: str | None = None


@dataclass
class Run:
    """A run so far: where, with which settings, what came out; `complete` once everything had its turn."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result]
    complete: bool = False


def describe_spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "min": min(values), "max": max(values), "q1": low, "q3": high}


def find_ratios(record: Record, base: Record) -> dict[str, float] | None:
    """How many times faster a record is than another, by laps of the same round; None where either has no figures."""
    if record.error or base.error or not record.seconds or len(record.seconds) != len(base.seconds):
        return None
    return describe_spread([a / b for a, b in zip(base.seconds, record.seconds, strict=True)])


def summarise_record(record: Record, records: list[Record]) -> dict[str, Any]:
    """A subject's figures."""
    if record.error or not record.seconds:
        return {"name": record.name, "title": record.title, "error": record.error or "no round was run"}
    first = records[0]
    ceiling = next((find_ratios(other, first) for other in records if other.name == "ceiling"), None)
    ratios = find_ratios(record, first)
    return {
        "name": record.name,
        "title": record.title,
        "seconds": describe_spread(record.seconds),
        "ratio": ratios,
        "share_of_ceiling": ratios["median"] / ceiling["median"] if ratios and ceiling else None,
        "attention_pairs": record.pairs,
        "attention_pairs_share": record.pairs / first.pairs if record.pairs is not None and first.pairs else None,
        "relative_difference": record.difference,
        "run_memory_bytes": record.run_memory,
        "graph_breaks": record.graph_breaks,
        "warm_up_seconds": record.warm_up_seconds,
        "runs_per_lap": record.runs_per_lap,
        "laps_seconds": record.seconds,
    }


def summarise(run: Run) -> dict[str, Any]:
    """The JSON document."""
    results = [
        {
            "kind": result.kind,
            **result.labels,
            "rounds": max((len(record.seconds) for record in result.records), default=0),
            "error": result.error,
            "subjects": [summarise_record(record, result.records) for record in result.records],
        }
        for result in run.results
    ]
    head = {"format": FORMAT, "version": VERSION, "complete": run.complete}
    return {**head, "machine": run.machine, "settings": run.settings, "results": results}


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
        "commit": current_commit(),
        "command": command,
    }


def write_report(out: Path, stem: str, run: Run) -> dict[str, Any]:
    """Write `stem`.json, .md and .png into a folder; the JSON document is also returned."""
    document = summarise(run)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{stem}.json", json.dumps(document, indent=1, allow_nan=False).encode())
    write_whole(out / f"{stem}.md", write_markdown(document).encode())
    write_whole(out / f"{stem}.png", draw_chart(document))
    return document


def name_machine(machine: dict[str, Any]) -> str:
    """The device in a word or two."""
    if machine["device"] != "cpu":
        return machine["device"]
    threads = machine["threads"]
    return f"{machine['processor']}, {threads} thread{'s' * (threads != 1)}"


def write_markdown(document: dict[str, Any]) -> str:
    """Set-up in words, then one table a contest."""
    machine, settings = document["machine"], document["settings"]
    lines = [
        "# Speed inside ComfyUI",
        "",
        f"{settings['weights']}, {settings['dtype']}, on {name_machine(machine)}; ComfyUI {machine['comfyui']}, torch "
        f"{machine['torch']}, commit {machine['commit']}.",
        "",
        "All subjects in one process, in turn, round by round after one uncounted run each. Seconds are medians over "
        "rounds; the speed-up is the median of the rounds' ratios to the first row, quartiles and extremes beside it. "
        "Of the ceiling: that speed-up as a share of the one that no mixing of tokens at all would give. Key pairs: "
        "query-key pairs of all attentions against the first row's. Memory: what a run takes beyond what was there "
        "before. A preset's step is one of its first half; where no layers of such a device have been measured before, "
        f"it is of the two finest levels, whether that pays or not. {settings['note']}",
        "",
        f"`{machine['command']}`",
        *([] if document["complete"] else ["", "**This run was not finished.**"]),
    ]
    missing = settings.get("missing_backends", {})
    lines += [f"\nAttention by {name} was left out: {why}" for name, why in missing.items()]
    for result in document["results"]:
        lines += ["", f"## {write_heading(result)}", ""]
        lines += [result["error"]] if result["error"] else tabulate(result["subjects"], result["kind"] == "profile")
    return "\n".join(lines) + "\n"


def write_heading(result: dict[str, Any]) -> str:
    """What was measured where, from the result's labels."""
    labels = {k: v for k, v in result.items() if k not in ("kind", "width", "height", "rounds", "error", "subjects")}
    described = ", ".join(k if v is True else f"{k} {v}" for k, v in labels.items())
    return f"{HEADINGS[result['kind']]}, {result['width']}x{result['height']} ({described}, rounds {result['rounds']})"


def tabulate(subjects: list[dict[str, Any]], as_shares: bool = False) -> list[str]:
    """Lines of a Markdown table; columns only where something was measured. `as_shares` holds parts against a whole."""
    rows = [list_cells(subject, as_shares) for subject in subjects]
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["subject"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[row.get(name, "") for name in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def list_cells(subject: dict[str, Any], as_shares: bool) -> dict[str, str]:
    """One row by column; of a failed subject the error alone."""
    if "error" in subject:
        return {"subject": f"{subject['title']}: {subject['error']}"}
    seconds, ratio = subject["seconds"], subject["ratio"]
    cells = {"subject": subject["title"], "s": f"{seconds['median']:.4g}"}
    cells["min..max"] = f"{seconds['min']:.4g}..{seconds['max']:.4g}"
    if ratio and as_shares:
        cells["of the layer"] = f"{1 / ratio['median']:.1%}"
    elif ratio:
        cells["speed-up"] = f"{ratio['median']:.2f}x"
        cells["quartiles"] = f"{ratio['q1']:.2f}..{ratio['q3']:.2f}"
        cells["extremes"] = f"{ratio['min']:.2f}..{ratio['max']:.2f}"
    for name, key, scale, form in (
        ("of the ceiling", "share_of_ceiling", 1, ".0%"),
        ("key pairs", "attention_pairs_share", 1, ".1%"),
        ("MB a run", "run_memory_bytes", 1e-6, ".0f"),
        ("graph breaks", "graph_breaks", 1, "d"),
    ):
        if subject[key] is not None:
            cells[name] = format(subject[key] * scale, form)
    return cells
