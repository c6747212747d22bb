"""Keep what the nodes need of the bench's and the evaluation's results: `python -m workflows.bench.measured FILE ...`.

Writes nodes/measured.json: which layers get faster on a kind of device, and speed and pictures of the presets.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dha.whole_file import write_whole
from dkd_trainer.record import current_command

from ..server import PACK
from .model import import_from_pack
from .report import FORMAT, VERSION, name_machine
from .subjects import name_steps

OUT = PACK / "nodes" / "measured.json"
SIZES = ("512x512", "768x768", "1024x1024", "2048x2048")
PICTURES = ("psnr", "psnr_training_free")
FIGURES = ("speed", "training_free", *PICTURES)  # of a preset; speeds are those of a shortened step


def read_result(path: Path) -> dict[str, Any]:
    """A bench's JSON of this version; raises ValueError for anything else."""
    document = json.loads(path.read_text(encoding="utf-8"))
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is {found}, expected {(FORMAT, VERSION)}: a result of `python -m workflows.bench`")
    return document


def find_kind(document: dict[str, Any]) -> str:
    return "cpu" if document["machine"]["device"] == "cpu" else "cuda"


def list_layers(document: dict[str, Any]) -> list[list]:
    """Rows (channels, tokens, share, speed-up) of single layers; the slower of training-free and student counts.

    A pair of which one was not measured is left out.
    """
    presets, rows = import_from_pack("dha.presets").PRESETS, []
    for result in document["results"]:
        if result["kind"] != "layer" or result["error"]:
            continue
        speeds = {s["name"]: s["ratio"]["median"] for s in result["subjects"] if s.get("ratio")}
        for name in (name.removeprefix("dha-") for name in speeds if name.startswith("dha-")):
            preset, tokens = presets.get(name), result["tokens"]
            first = preset.stretches[0] if preset else None
            share = first.find_share(tokens) if first else float(name)
            if f"student-{name}" in speeds:
                slower = min(speeds[f"dha-{name}"], speeds[f"student-{name}"])
                rows.append([result["channels"], tokens, share, round(slower, 3)])
    return rows


def build_table(document: dict[str, Any]) -> dict[str, Any]:
    """A device's layers with where they come from."""
    machine = document["machine"]
    origin = {key: machine[key] for key in ("torch", "commit", "command")}
    head = {"device": find_kind(document), "dtype": document["settings"]["dtype"], "machine": name_machine(machine)}
    return {**head, **origin, "rows": list_layers(document)}


def list_speeds(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By preset `speed`, the speed-ups of its UNet steps by size, first batch, PyTorch's attention, eager.

    One for each stretch of the preset. They are the student's where any was measured at that preset; else they say
    `training_free`.
    """
    found: dict[str, dict[str, float]] = {}  # speed-up by subject, by size
    for result in document["results"]:
        size = f"{result['width']}x{result['height']}"
        if result["kind"] != "step" or result.get("backend") != "sdpa" or result.get("compiled") or size not in SIZES:
            continue
        by_name = found.setdefault(size.split("x")[0], {})
        for subject in result["subjects"]:
            if subject.get("ratio"):
                by_name.setdefault(subject["name"], round(subject["ratio"]["median"], 2))
    speeds = {}
    for preset in import_from_pack("dha.presets").PRESETS:
        student, free = (pick_speeds(found, name_steps(kind, preset)) for kind in ("student", "dha"))
        if student or free:
            speeds[preset] = {"speed": student} if student else {"speed": free, "training_free": True}
    return speeds


def pick_speeds(found: dict[str, dict[str, float]], names: list[str]) -> dict[str, list[float]]:
    """Speed-ups of the named subjects by size; sizes at which one was not measured are left out."""
    sizes = sorted((size for size in found if all(name in found[size] for name in names)), key=int)
    return {size: [found[size][name] for name in names] for size in sizes}


def read_pictures(path: Path) -> dict[str, dict[str, float]]:
    """By preset the median PSNR to the original, with the student and without it, from an evaluation's JSON."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found: dict[str, dict[str, float]] = {}
    presets = import_from_pack("dha.presets").PRESETS
    for name, row in rows.items():
        _, _, preset = name.rpartition(", preset ")
        if preset in presets:
            figure = PICTURES["training-free" in name]
            found.setdefault(preset, {})[figure] = round(row["psnr"], 1)
    return found


def merge(
    kept: dict[str, Any], documents: list[dict[str, Any]], pictures: dict[str, dict[str, float]], command: str
) -> dict[str, Any]:
    """The file's new content: newly measured layers take the place of the same device's and precision's old ones.

    Speeds of all presets are of one run, or of several that `join_runs`, which their note names: those of an earlier
    one go.
    """
    tables = {(table["device"], table["dtype"], table["machine"]): table for table in kept["layers"]}
    presets = {key: dict(value) for key, value in kept["presets"].items() if key != "notes"}
    notes = list(kept["presets"].get("notes", []))
    joined: dict[str, Any] = {}
    for document in documents:
        table, joined = build_table(document), join_runs(joined, document)
        if table["rows"]:
            tables[table["device"], table["dtype"], table["machine"]] = table
        if speeds := list_speeds(joined):
            others = {name: {k: v for k, v in f.items() if k in PICTURES} for name, f in presets.items()}
            presets = {name: {**others.get(name, {}), **speeds.get(name, {})} for name in {**others, **speeds}}
            notes = [line for line in notes if not line.startswith("Speed:")] + [describe_speed(table, speeds)]
    for name, figures in pictures.items():
        presets.setdefault(name, {}).update(figures)
    if pictures:
        note = "Pictures: PSNR to the original's, of the mini SD-2.1 at 128x128 with its student."
        notes = [line for line in notes if not line.startswith(("Error:", "Pictures:"))] + [note]
    shown = {**order(presets), **({"notes": notes} if notes else {})}
    return {"format": kept["format"], "command": command, "layers": list(tables.values()), "presets": shown}


def join_runs(earlier: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """A run with the sizes that only an earlier one of the same machine, precision and commit has."""

    def circumstances(run: dict[str, Any]) -> tuple:
        return name_machine(run["machine"]), run["settings"]["dtype"], run["machine"]["commit"]

    if not earlier or circumstances(earlier) != circumstances(document):
        return document
    steps = [result for result in document["results"] if result["kind"] == "step"]
    sizes = {(result["width"], result["height"]) for result in steps}
    missing = [result for result in earlier["results"] if (result["width"], result["height"]) not in sizes]
    return {**document, "results": [*document["results"], *missing]}


def order(presets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same from the same figures, whichever came first; presets without any are left out."""
    names = [name for name in import_from_pack("dha.presets").PRESETS if presets.get(name)]
    return {name: {key: presets[name][key] for key in FIGURES if key in presets[name]} for name in names}


def describe_speed(table: dict[str, Any], speeds: dict[str, dict[str, Any]]) -> str:
    """The note under the speeds: whose step it was, and where."""
    free = [name for name, figures in speeds.items() if figures.get("training_free")]
    whose = "with a student" if len(free) < len(speeds) else "training-free"
    except_for = f" ({', '.join(free)}: training-free)" if 0 < len(free) < len(speeds) else ""
    where = f"{table['machine']}, {table['dtype']}, commit {table['commit']}"
    return f"Speed: of a sampling, from a UNet step of SD-2.1 {whose}{except_for}, {where}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflows.bench.measured", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of the bench, the one to show last")
    parser.add_argument("--pictures", type=Path, help="JSON of dkd_trainer evaluate --presets")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to renew (nodes/measured.json)")
    arguments = parser.parse_args()
    try:
        documents = [read_result(path) for path in arguments.results]
        pictures = read_pictures(arguments.pictures) if arguments.pictures else {}
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    kept = import_from_pack("nodes.measured").read_measured(arguments.out)
    content = merge(kept, documents, pictures, current_command("workflows.bench.measured"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out, (json.dumps(content, indent=1) + "\n").encode())
    rows = sum(len(table["rows"]) for table in content["layers"])
    print(f"{arguments.out}: {len(content['layers'])} devices, {rows} layers, presets {sorted(content['presets'])}")


if __name__ == "__main__":
    main()
