"""`python -m dkd_trainer.evaluate`: teacher, students and peers on held-out pairs, as tables, pictures and plots."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .evaluation import SHOWN, Sampling, judge_pictures, measure_subject
from .hardware import describe_run
from .held_out import HeldOut, open_held_out
from .host import ROOT, Teacher, ensure_comfy
from .judges import list_judges
from .kept import Kept, name_code, name_file
from .peers import list_peers
from .report import Report, write_report
from .stopwatch import time_subjects
from .students import list_students, peer_levels, read_students
from .subject import Subject, list_null_band
from .summary import summarise

MODELS = ROOT / "workflows" / "models"


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults evaluate the shipped models."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer.evaluate", description=__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, default=MODELS / "checkpoints" / "mini-sd21.safetensors")
    add("--students", type=Path, nargs="*", default=[MODELS / "dha" / "mini-sd21-dha.safetensors"])
    add("--budgets", type=float, nargs="+", help="shares of the tokens that become keys (each student's own)")
    add("--held-out", type=Path, required=True, help="folder of pairs that training never saw")
    add("--skip", type=int, default=0, help="held-out pairs to leave out first: choose on some, report on others")
    add("--count", type=int, default=256, help="held-out pairs to use (%(default)s)")
    add("--size", type=int, default=512, help="side of the pictures in pixels (%(default)s; mini teacher: 128)")
    add("--steps", type=int, default=25, help="of Euler's method (%(default)s)")
    add("--cfg", type=float, default=4.0, help="guidance scale (%(default)s)")
    add("--batch", type=int, default=32, help="pictures drawn at once (%(default)s)")
    add("--no-peers", action="store_true", help="students and the null band alone")
    add("--scorer", type=Path, help="prompt scorer from dkd_trainer.metrics.prompt_score (emoji scenes)")
    add("--clip-weights", type=Path, help="weights for a CLIP score by open_clip; nothing is downloaded")
    add("--clip-model", default="ViT-B-32", help="their architecture as open_clip names it (%(default)s)")
    add("--rounds", type=int, default=9, help="of timing, 0 for none (%(default)s)")
    add("--time-size", type=int, nargs="+", help="sides in pixels at which a UNet step is timed (that of --size)")
    add("--time-checkpoint", type=Path, help="time the same subjects on another SD-2.x checkpoint, students untrained")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--comfyui", help="ComfyUI's folder, when it is not on PYTHONPATH (or COMFYUI_PATH)")
    add("--out", type=Path, required=True, help="folder for the results; the same command goes on where it stopped")
    return parser.parse_args(arguments)


def open_kept(args: argparse.Namespace, held_out: HeldOut, sampling: Sampling, missing: dict[str, str]) -> Kept:
    """Results so far under everything that decides all of them."""
    files = [file for file in (args.teacher, args.scorer, args.clip_weights) if file is not None]
    common = {
        "files": [name_file(file) for file in files],
        "pairs": held_out.identity,
        "sampling": asdict(sampling),
        "clip_model": args.clip_model,
        "missing": sorted(missing),
        "device": torch.device(args.device).type,
        "code": name_code(),
    }
    return Kept(args.out / "kept", common)


def list_subjects(args: argparse.Namespace, teacher: Teacher) -> list[Subject]:
    """The null band, DHA at every budget, and the peers at the levels of the first student; raises ValueError."""
    students = read_students(args.students, teacher)
    subjects = [*list_null_band(args.steps), *list_students(students, args.budgets)]
    if not args.no_peers:
        subjects += list_peers(peer_levels(students))
    names = [subject.name for subject in subjects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]!r} would stand for two subjects; rename one of the files")
    return subjects


def time_all(args: argparse.Namespace, teacher: Teacher, subjects: list[Subject]) -> list[dict]:
    """Seconds of a step at every size asked for, on the teacher or on the checkpoint that stands in for it."""
    if not args.rounds:
        return []
    timed = [subject for subject in subjects if subject.family not in ("null", "far end")]
    name = args.teacher.name
    if args.time_checkpoint is not None:
        teacher, name = Teacher(args.time_checkpoint, teacher.device), args.time_checkpoint.name
    settings = {"checkpoint": name, "architecture": teacher.architecture.label, "batch": 2, "rounds": args.rounds}
    sizes = args.time_size or [args.size]
    return [{**settings, "size": s, "subjects": time_subjects(teacher, timed, s, 2, args.rounds)} for s in sizes]


def evaluate(args: argparse.Namespace) -> Report:
    """Measure what is not measured yet, and put it all together."""
    teacher = Teacher(args.teacher, torch.device(args.device))
    sampling = Sampling(args.steps, args.cfg, args.batch)
    held_out = open_held_out(args.held_out, teacher, args.out / "cache", args.size, args.skip, args.count)
    judges, missing = list_judges(args.scorer, args.clip_weights, args.clip_model)
    kept = open_kept(args, held_out, sampling, missing)
    itself, subjects = Subject("teacher", "teacher"), list_subjects(args, teacher)
    reference = kept.get_tensors(itself.key, lambda: measure_subject(teacher, itself, held_out, sampling, judges))
    judged = {**judges, "pairs": {}, "latents": {}}
    real = judge_pictures(held_out.pictures, held_out.latents, held_out.prompts, judged, None)
    rows = {itself.name: summarise(reference, reference, real)}
    sheet = [(itself.name, reference["pictures"][:SHOWN])]
    for subject in subjects:
        measured = kept.get_tensors(
            subject.key, lambda s=subject: measure_subject(teacher, s, held_out, sampling, judges, reference)
        )
        rows[subject.name] = summarise(measured, reference, real)
        sheet.append((subject.name, measured["pictures"]))
        print(f"{subject.name}: error {rows[subject.name].get('error mean', 0):.4f}", flush=True)
    rows["real pictures"] = summarise(real, reference, real)
    settings = {
        "teacher": args.teacher.name,
        "architecture": teacher.architecture.label,
        "prediction": teacher.prediction,
        "dtype": "fp32",
        "sampler": "Euler",
        **asdict(sampling),
        "size": args.size,
        "held_out_pairs": f"{args.skip} to {args.skip + args.count - 1}",
        "students": {file.name: name_file(file) for file in args.students},
    }
    timing = time_all(args, teacher, [itself, *subjects])
    record = describe_run("dkd_trainer.evaluate", teacher.device)
    families = {subject.name: (subject.family, subject.label) for subject in subjects}
    return Report(record, settings, rows, families, timing, missing, sheet)


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    ensure_comfy(args.comfyui)
    for path in write_report(evaluate(args), args.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (FileNotFoundError, ValueError, ImportError) as error:
        sys.exit(f"dkd_trainer.evaluate: {error}")
