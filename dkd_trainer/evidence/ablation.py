"""`python -m dkd_trainer ablation`: what each stage and each part is worth, at equal cost and equal training time."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dha.config import DHAConfig
from dha.sites import SITES
from dha.student import FREE_CONFIG
from dha.whole_file import write_whole

from ..data.corpus import open_corpus
from ..engine.loop import train_student
from ..engine.occupancy import occupy
from ..engine.processes import Processes
from ..host import Teacher
from ..settings import Settings, assemble_settings, parse_override
from .ablation_rows import (
    GROUPS,
    TrainedRow,
    list_context_rows,
    list_part_rows,
    list_stage_rows,
    list_term_rows,
)
from .attention_cost import count_cost, count_full, match_budget
from .commands import run_command
from .comparison import Comparison, add_arguments
from .kept import name_training
from .pace import plan_steps
from .report import write_report
from .students import describe, read_students, spend_budget, training_free
from .subject import list_null_band

NOTE = (
    "Every trained row was given the same time, in steps by the measured pace of its stages. Attention cost: "
    "multiply-adds of a layer at the finest level as a share of the teacher's; official has the sparsity that costs as "
    "much, and the training-free form comes with the student's number of keys and at the student's cost."
)


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer ablation", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of training pairs")
    parser.add_argument("--seconds", type=float, default=600, help="of training for every row (%(default)s)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["stages"], help="of rows (stages)")
    parser.add_argument("--only", nargs="+", help="names of trained rows to run")
    parser.add_argument("--preset", default="mini", help="settings that the rows vary (%(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one setting for all rows; for official only those of [train] and [data]",
    )
    return parser.parse_args(arguments)


def list_rows(args: argparse.Namespace, student: DHAConfig, side: int, channels: int) -> list[TrainedRow]:
    """The trained rows of the groups asked for; raises ValueError when `--only` names another one."""
    stages = list_stage_rows(student, args.preset, side, channels) if "stages" in args.groups else []
    parts = list_part_rows(student, args.preset) if "parts" in args.groups else []
    terms = list_term_rows(args.preset) if "terms" in args.groups else []
    rows = [*stages, *parts, *terms]
    if unknown := sorted(set(args.only or ()) - {row.name for row in rows}):
        raise ValueError(f"there is no row {unknown[0]!r}; the rows are {', '.join(repr(row.name) for row in rows)}")
    return rows


def row_settings(args: argparse.Namespace, row: TrainedRow) -> Settings:
    """A row's settings; its steps and its file are not planned yet."""
    given = [parse_override(text) for text in args.set]
    if row.preset == "official":  # what is published stays
        given = [(name, value) for name, value in given if name.startswith(("train.", "data."))]
    overrides = [
        *given,
        ("data.size", args.size),
        ("output.file", str(args.out / "students" / f"{row.stem}.safetensors")),
        ("watch.validate_every", 0),
        ("watch.sheet_every", 0),
        *row.overrides,
    ]
    return assemble_settings(row.preset, None, overrides)


def name_run(settings: Settings, *more: object) -> str:
    """A short hash of what decides a student, the code among it."""
    return hashlib.sha256(json.dumps([settings.describe_run(), name_training(), *more]).encode()).hexdigest()[:8]


def plan_rows(
    args: argparse.Namespace, rows: list[TrainedRow], teacher: Teacher, corpus
) -> list[tuple[TrainedRow, Settings]]:
    """Rows with their settings and as many steps of each stage as the time allows, measured once and then kept."""
    settings = {row.name: (row, row_settings(args, row)) for row in rows}
    names = [name_run(own, row.shares, teacher.device.type) for row, own in settings.values()]
    key = hashlib.sha256(json.dumps([names, args.seconds, corpus.identity]).encode()).hexdigest()[:8]
    plan = args.out / f"plan-{key}.json"
    if not plan.is_file():
        write_whole(plan, json.dumps(plan_steps(teacher, corpus, settings, args.seconds), indent=1).encode())
    steps = json.loads(plan.read_text())
    return [(row, name_files(own, steps[row.name], teacher, corpus.identity)) for row, own in settings.values()]


def name_files(settings: Settings, steps: dict[str, int], teacher: Teacher, pairs: str) -> Settings:
    """Settings with planned steps, whose files are named for all that decides the student."""
    planned = replace(settings, **{name: replace(getattr(settings, name), steps=n) for name, n in steps.items()})
    stem = f"{planned.out.stem}-{name_run(planned, teacher.describe_weights(), pairs)}"
    return replace(planned, output=replace(planned.output, file=str(planned.out.with_stem(stem))))


def train_row(settings: Settings, teacher: Teacher, corpus) -> dict[str, float]:
    """Train a row's student, unless it is there already; what it cost."""
    record = settings.out.with_suffix(".json")
    if not record.is_file():  # it is written last
        with occupy(settings.work, Processes(settings.train)):
            train_student(teacher, corpus, settings)
    found = json.loads(record.read_text())
    return {"train_seconds": found["seconds"], "train_steps": float(found["steps"])}


def measure_row(row: TrainedRow, file: Path, comparison: Comparison) -> DHAConfig:
    """Measure a row's student under the row's name; its configuration."""
    student = read_students([file], comparison.teacher)[file]
    spending = None if student.config.mode == "official" else spend_budget(student.config.token_budget)
    subject = describe(file, student, spending)
    comparison.measure(replace(subject, name=row.name, family=row.family, label=row.name))
    return student.config


def run_ablation(args: argparse.Namespace) -> list[Path]:
    """Train and measure what is not there yet, and write the report; its files."""
    comparison = Comparison(args)
    teacher, common = comparison.teacher, common_settings(args)
    student, cache = common.student, Path(common.data.cache or args.out / "cache")
    corpus = open_corpus(args.data, teacher, cache, args.size)
    level = min(student.levels)
    side = -(-args.size // 8 >> level)
    channels = next(teacher.architecture.channels[site.name] for site in SITES if site.level == level)
    rows = list_rows(args, student, side, channels)
    configs = measure_untrained(args, comparison, student, side, channels)
    files = []
    for row, settings in plan_rows(args, rows, teacher, corpus):
        if args.only and row.name not in args.only:
            continue
        spent = train_row(settings, teacher, corpus)
        files.append(settings.out)
        configs[row.name] = measure_row(row, settings.out, comparison)
        comparison.rows[row.name] |= spent
    full = count_full(side * side, channels)
    for name, config in configs.items():
        comparison.rows[name]["attention_cost"] = count_cost(config, side, channels) / full
    return write_report(comparison.report(files, NOTE), args.out, "ablation")


def measure_untrained(
    args: argparse.Namespace, comparison: Comparison, student: DHAConfig, side: int, channels: int
) -> dict[str, DHAConfig]:
    """The null band, the training-free form with the student's keys and at its cost, and contexts if asked for.

    Returns the configurations of the training-free forms by name.
    """
    plain = replace(FREE_CONFIG, levels=student.levels, token_budget=student.token_budget)
    richer = match_budget(plain, count_cost(student, side, channels), side, channels)
    free = [(training_free(c.levels, spend_budget(c.token_budget)), c) for c in dict.fromkeys((plain, richer))]
    contexts = list_context_rows(student.levels) if "contexts" in args.groups else []
    null = list_null_band(args.steps, comparison.teacher.device)
    for subject in [*null, *(subject for subject, _ in free), *contexts]:
        comparison.measure(subject)
    return {subject.name: config for subject, config in free}


def common_settings(args: argparse.Namespace) -> Settings:
    """What all rows vary."""
    return assemble_settings(args.preset, None, [parse_override(text) for text in args.set])


def main(arguments: Sequence[str] | None = None) -> None:
    run_command("ablation", run_ablation, read_arguments(arguments))
