"""`python -m dkd_trainer evaluate`: teacher, students and peers on held-out pairs, as tables, pictures and plots."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..host import ROOT
from .commands import parse_landmarks, parse_share, parse_stretches, run_command
from .comparison import Comparison, add_arguments
from .peers import list_fewer_steps, list_peers
from .report import write_report
from .students import list_students, peer_levels, read_students
from .subject import Subject, list_null_band

SHIPPED_STUDENT = ROOT / "workflows" / "models" / "dha" / "mini-sd21-dha.safetensors"


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults evaluate the shipped models."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer evaluate", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--students", type=Path, nargs="*", default=[SHIPPED_STUDENT], help="files (the shipped one)")
    parser.add_argument(
        "--budgets", type=float, nargs="+", help="shares of the tokens that become keys (each student's own)"
    )
    end = partial(parse_share, "end", "schedule")
    parser.add_argument(
        "--ends", type=end, nargs="+", default=[], help="shares of the schedule before an exact rest, own budgets"
    )
    parser.add_argument(
        "--landmarks",
        type=parse_landmarks,
        nargs="+",
        default=[],
        help="numbers of landmarks, own budgets (each student's own; 64)",
    )
    parser.add_argument(
        "--stretches",
        type=parse_stretches,
        nargs="+",
        default=[],
        help="shares of the keys that change while it samples, and an exact rest: 0.125:0.5,0.25:0.9 is an eighth "
        "until half of the schedule, then a quarter until nine tenths; a part with :plain behind it runs untrained",
    )
    parser.add_argument("--presets", action="store_true", help="the presets of Apply DHA as well")
    parser.add_argument("--no-peers", action="store_true", help="students and the null band alone")
    return parser.parse_args(arguments)


def list_subjects(args: argparse.Namespace, comparison: Comparison) -> list[Subject]:
    """The null band, DHA at every budget, end and preset, and peers at the first student's levels; or ValueError."""
    students = read_students(args.students, comparison.teacher)
    subjects = list_null_band(args.steps, comparison.teacher.device)
    subjects += list_students(students, args.budgets, args.ends, args.presets, args.stretches, args.landmarks)
    if not args.no_peers:
        subjects += list_fewer_steps(args.steps) + list_peers(peer_levels(students))
    names = [subject.name for subject in subjects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]!r} would stand for two subjects; rename one of the files")
    return subjects


def evaluate(args: argparse.Namespace) -> list[Path]:
    """Measure what is not measured yet, and write the report; its files."""
    comparison = Comparison(args)
    for subject in list_subjects(args, comparison):
        comparison.measure(subject)
    return write_report(comparison.report(args.students), args.out, "evaluation")


def main(arguments: Sequence[str] | None = None) -> None:
    run_command("evaluate", evaluate, read_arguments(arguments))
