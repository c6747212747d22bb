"""What all subjects of an evaluation have in common: the teacher, the held-out pairs, the metrics, and what is kept."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..host import SHIPPED_TEACHER, Teacher
from .evaluation import SHOWN, Sampling, judge_pictures, measure_subject
from .hardware import describe_run
from .held_out import HeldOut, open_held_out
from .judges import list_judges
from .kept import Kept, name_code, name_file
from .report import Report
from .stopwatch import time_subjects
from .subject import PRECISIONS, Subject
from .summary import Row, summarise

UNTIMED = ("null", "far end")  # families


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decide what subjects are compared on."""
    add = parser.add_argument
    add("--teacher", type=Path, default=SHIPPED_TEACHER, help="an SD-2.x checkpoint (the mini SD-2.1)")
    add("--held-out", type=Path, required=True, help="folder of pairs that training never saw")
    add("--skip", type=int, default=0, help="held-out pairs to leave out first: choose on some, report on others")
    add("--count", type=int, default=256, help="held-out pairs to use (%(default)s)")
    add("--size", type=int, default=512, help="side of the pictures in pixels (%(default)s; mini teacher: 128)")
    add("--steps", type=int, default=25, help="of Euler's method (%(default)s)")
    add("--cfg", type=float, default=4.0, help="guidance scale (%(default)s)")
    add("--batch", type=int, default=32, help="pictures drawn at once (%(default)s)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of all UNets, by autocast, which casts weights anew (%(default)s)",
    )
    add("--scorer", type=Path, help="prompt scorer from dkd_trainer.metrics.prompt_score (emoji scenes)")
    add("--clip-weights", type=Path, help="weights for a CLIP score by open_clip; nothing is downloaded")
    add("--clip-model", default="ViT-B-32", help="their architecture as open_clip names it (%(default)s)")
    add("--rounds", type=int, default=9, help="of timing, 0 for none (%(default)s)")
    add("--time-size", type=int, nargs="+", help="sides in pixels at which a UNet step is timed (that of --size)")
    add("--time-checkpoint", type=Path, help="time the same subjects on another SD-2.x checkpoint, students untrained")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--comfyui", help="ComfyUI's folder, when it is not on PYTHONPATH (or COMFYUI_PATH)")
    add("--out", type=Path, required=True, help="folder for the results; the same command goes on where it stopped")


def read_sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.steps, args.cfg, args.batch, args.precision)


def describe_circumstances(args: argparse.Namespace, held_out: HeldOut, code: str) -> dict:
    """Everything that decides what is measured of any subject, from the options of `add_arguments`."""
    files = [file for file in (args.teacher, args.scorer, args.clip_weights) if file is not None]
    return {
        "files": [name_file(file) for file in files],
        "pairs": held_out.identity,
        "sampling": asdict(read_sampling(args)),
        "clip_model": args.clip_model,
        "device": torch.device(args.device).type,
        "code": code,
    }


class Comparison:
    """Subjects measured one after the other against the same teacher; raises DataError, FileNotFoundError, ImportError.

    A subject that was measured under the same circumstances before is read from the folder `kept`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.sampling = args, read_sampling(args)
        self.judges, self.missing = list_judges(args.scorer, args.clip_weights, args.clip_model)
        self.teacher = Teacher(args.teacher, torch.device(args.device))
        cache = args.out / "cache"
        self.held_out = open_held_out(args.held_out, self.teacher, cache, args.size, args.skip, args.count)
        common = describe_circumstances(args, self.held_out, name_code())
        self.kept = Kept(args.out / "kept", common | {"missing": sorted(self.missing)})
        self.subjects: list[Subject] = []
        self.rows: dict[str, Row] = {}
        self.sheet: list[tuple[str, Tensor]] = []
        held_out, alone = self.held_out, {**self.judges, "pairs": {}, "latents": {}}
        self.real = judge_pictures(held_out.pictures, held_out.latents, held_out.prompts, alone, None)
        self.reference: dict[str, Tensor] | None = None
        self.reference = self.measure(Subject("teacher", "teacher"))

    def measure(self, subject: Subject) -> dict[str, Tensor]:
        """Measure a subject, or read what was kept of it, and add its row."""

        def measure() -> dict[str, Tensor]:
            return measure_subject(self.teacher, subject, self.held_out, self.sampling, self.judges, self.reference)

        measured = self.kept.get_tensors(subject.key, measure)
        self.subjects.append(subject)
        self.rows[subject.name] = summarise(measured, self.reference or measured, self.real)
        self.sheet.append((subject.name, measured["pictures"][:SHOWN]))
        print(f"{subject.name}: error {self.rows[subject.name].get('error mean', 0):.4f}", flush=True)
        return measured

    def time_all(self) -> list[dict]:
        """Seconds of a step of every subject at every size asked for, on the checkpoint asked for."""
        args, teacher, name = self.args, self.teacher, self.args.teacher.name
        if not args.rounds:
            return []
        timed = [subject for subject in self.subjects if subject.family not in UNTIMED]
        if args.time_checkpoint is not None:
            teacher, name = Teacher(args.time_checkpoint, teacher.device), args.time_checkpoint.name
        settings = {"checkpoint": name, "architecture": teacher.architecture.label, "batch": 2, "rounds": args.rounds}
        sizes = args.time_size or [args.size]
        how = {"batch": 2, "rounds": args.rounds, "sampling": args.steps, "precision": args.precision}
        return [{**settings, "size": s, "subjects": time_subjects(teacher, timed, s, **how)} for s in sizes]

    def report(self, students: list[Path], note: str = "") -> Report:
        """All there is to say, with the real pictures as the last row."""
        rows = {**self.rows, "real pictures": summarise(self.real, self.reference or {}, self.real)}
        settings = {
            "teacher": self.args.teacher.name,
            "architecture": self.teacher.architecture.label,
            "prediction": self.teacher.prediction,
            "sampler": "Euler",
            **asdict(self.sampling),
            "size": self.args.size,
            "held_out_pairs": f"{self.args.skip} to {self.args.skip + self.args.count - 1}",
            "students": {file.name: name_file(file) for file in students},
            "note": note,
        }
        families = {subject.name: (subject.family, subject.label) for subject in self.subjects}
        ours = {subject.name for subject in self.subjects if subject.is_dha}
        shown = [subject.name for subject in self.subjects if subject.is_shown]
        record = describe_run(self.teacher.device)
        return Report(record, settings, rows, families, ours, self.time_all(), self.missing, self.sheet, shown)
