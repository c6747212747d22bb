"""`python -m dkd_trainer.ablation`: what each stage and each part is worth, at equal cost and equal training time."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dha.config import DHAConfig
from dha.sites import SITES

from .ablation_rows import GROUPS, TrainedRow, list_context_rows, list_part_rows, list_stage_rows
from .attention_cost import count_cost, count_full
from .cache import write_whole
from .comparison import Comparison, add_arguments
from .corpus import open_corpus
from .host import Teacher, ensure_comfy
from .loop import train_student
from .pace import plan_steps
from .report import write_report
from .settings import Settings, assemble_settings, parse_override
from .state import TrainingStopped
from .students import describe, read_students, training_free
from .subject import list_null_band

NOTE = (
    "Every trained row was given the same time, in steps by the measured pace of its stages. Attention cost: multiply-adds "
    "of a replaced layer of the finest level, as a share of the teacher's; official has the sparsity that costs as much."
)


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer.ablation", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of training pairs")
    parser.add_argument("--seconds", type=float, default=600, help="of training for every row (%(default)s)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["stages"], help="of rows (stages)")
    parser.add_argument("--only", nargs="+", help="names of trained rows to run")
    parser.add_argument("--preset", default="mini", help="settings that the rows vary (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting for all rows")
    return parser.parse_args(arguments)


def list_rows(args: argparse.Namespace, student: DHAConfig, side: int, channels: int) -> list[TrainedRow]:
    """The trained rows asked for; raises ValueError for an unknown name."""
    stages = list_stage_rows(student, args.preset, side, channels) if "stages" in args.groups else []
    parts = list_part_rows(student, args.preset) if "parts" in args.groups else []
    rows = [*stages, *parts]
    if unknown := sorted(set(args.only or ()) - {row.name for row in rows}):
        raise ValueError(f"there is no row {unknown[0]!r}; the rows are {', '.join(repr(row.name) for row in rows)}")
    return [row for row in rows if not args.only or row.name in args.only]


def row_settings(args: argparse.Namespace, row: TrainedRow) -> Settings:
    """A row's settings; its steps and its file are not planned yet."""
    overrides = [
        *(parse_override(text) for text in args.set),
        ("data.size", args.size),
        ("output.file", str(args.out / "students" / f"{row.stem}.safetensors")),
        ("watch.validate_every", 0),
        ("watch.sheet_every", 0),
        *row.overrides,
    ]
    return assemble_settings(row.preset, None, overrides)


def name_run(settings: Settings, *more: object) -> str:
    """A short hash of what decides a student."""
    return hashlib.sha256(json.dumps([settings.describe_run(), *more]).encode()).hexdigest()[:8]


def plan_row(args: argparse.Namespace, row: TrainedRow, comparison: Comparison, corpus) -> Settings:
    """A row's settings with as many steps of each stage as the time allows, measured once and then kept."""
    settings, teacher = row_settings(args, row), comparison.teacher
    pairs = len(corpus)
    plan = args.out / "plans" / f"{row.stem}-{name_run(settings, args.seconds, row.shares, pairs)}.json"
    if not plan.is_file():
        steps = plan_steps(teacher, corpus, settings, args.seconds, row.shares)
        plan.parent.mkdir(parents=True, exist_ok=True)
        write_whole(plan, json.dumps(steps).encode())
    parts = {name: replace(getattr(settings, name), steps=n) for name, n in json.loads(plan.read_text()).items()}
    planned = replace(settings, **parts)
    stem = f"{row.stem}-{name_run(planned, teacher.fingerprint, pairs)}"
    return replace(planned, output=replace(planned.output, file=str(planned.out.with_stem(stem))))


def train_row(settings: Settings, teacher: Teacher, corpus) -> dict[str, float]:
    """Train a row's student, unless it is there already; what it cost."""
    record = settings.out.with_suffix(".json")
    if not record.is_file():  # it is written last
        train_student(teacher, corpus, settings)
    found = json.loads(record.read_text())
    return {"train_seconds": found["seconds"], "train_steps": float(found["steps"])}


def measure_row(row: TrainedRow, file: Path, comparison: Comparison) -> DHAConfig:
    """Measure a row's student under the row's name; its configuration."""
    student = read_students([file], comparison.teacher)[file]
    budget = None if student.config.mode == "official" else student.config.token_budget
    subject = describe(file, student, budget)
    comparison.measure(replace(subject, name=row.name, family=row.family, label=row.name))
    return student.config


def run_ablation(args: argparse.Namespace) -> list[Path]:
    """Train and measure what is not there yet, and write the report; its files."""
    comparison = Comparison(args)
    teacher, student = comparison.teacher, common_student(args)
    corpus = open_corpus(args.data, teacher, args.out / "cache", args.size)
    level = min(student.levels)
    side = -(-args.size // 8 >> level)
    channels = next(teacher.architecture.channels[site.name] for site in SITES if site.level == level)
    rows = list_rows(args, student, side, channels)
    configs = {(free := training_free(student.levels, student.token_budget)).name: DHAConfig.from_json(free.identity)}
    contexts = list_context_rows(student.levels) if "contexts" in args.groups else []
    for subject in [*list_null_band(args.steps), free, *contexts]:
        comparison.measure(subject)
    files = []
    for row in rows:
        settings = plan_row(args, row, comparison, corpus)
        spent = train_row(settings, teacher, corpus)
        files.append(settings.out)
        configs[row.name] = measure_row(row, settings.out, comparison)
        comparison.rows[row.name] |= spent
    full = count_full(side * side, channels)
    for name, config in configs.items():
        comparison.rows[name]["attention_cost"] = count_cost(config, side, channels) / full
    return write_report(comparison.report("dkd_trainer.ablation", files, NOTE), args.out, "ablation")


def common_student(args: argparse.Namespace) -> DHAConfig:
    """The student that the rows vary."""
    return assemble_settings(args.preset, None, [parse_override(text) for text in args.set]).student


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    try:
        ensure_comfy(args.comfyui)
        for path in run_ablation(args):
            print(f"wrote {path}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        sys.exit(f"dkd_trainer.ablation: {error}")


if __name__ == "__main__":
    main()
