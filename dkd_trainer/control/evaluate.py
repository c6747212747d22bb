"""`python -m dkd_trainer control evaluate`: controls on held-out pictures, with the teacher and with DHA students."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dha.frequency import BANDS

from ..data.pictures import cut_picture
from ..evidence.commands import run_command
from ..evidence.comparison import add_arguments, describe_circumstances, read_sampling
from ..evidence.hardware import describe_run
from ..evidence.held_out import HeldOut, open_held_out, to_bytes
from ..evidence.judges import list_judges
from ..evidence.kept import Kept, name_code, name_file
from ..evidence.stopwatch import time_subjects
from ..evidence.students import read_students
from ..host import Teacher
from ..metrics.captions import ASPECTS
from ..metrics.features import load_feature_net
from ..metrics.prompt_score import load_prompt_scorer
from .findings import FREE, Drawn, Findings, write_findings
from .steering import FrozenBranch, read_branches
from .tasks import Task, change_prompts, keep_prompts, read_prompts
from .variant import Variant, is_uncontrolled, measure_memory, measure_variant

STEERING = ("branch", "steering", "variant")
CODE = (*(f"dkd_trainer/control/{name}.py" for name in STEERING), "dkd_trainer/metrics/structure.py")


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer control evaluate", description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--controls", type=Path, nargs="+", required=True, help="control files, one of each band")
    add("--students", type=Path, nargs="*", default=[], help="DHA students, each at its own budget")
    add("--accelerate", action="store_true", help="students run in the control branch as well, not in the UNet alone")
    add("--strengths", type=float, nargs="+", default=[0.5, 1.0], help="of the control, beside 0 (%(default)s)")
    add("--changed", nargs="*", default=[], metavar="BAND=FILE", help="changed prompts, one a line (made for emoji)")
    add("--more-sizes", nargs="*", default=[], metavar="WIDTHxHEIGHT", help="other sizes, at the last strength")
    add("--picks", type=int, nargs="+", default=[0, 1], help="pictures of control.jpg by number (%(default)s)")
    add("--more-count", type=int, default=16, help="pictures at other sizes (%(default)s)")
    return parser.parse_args(arguments)


def read_size(text: str) -> tuple[int, int]:
    """`192x128` -> (192, 128); raises ValueError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) >= 64 and int(part) % 8 == 0 for part in parts):
        raise ValueError(f"--more-sizes {text!r}: expected WIDTHxHEIGHT in pixels, both multiples of 8 from 64 on")
    return int(parts[0]), int(parts[1])


def read_changes(texts: list[str]) -> dict[str, list[str]]:
    """Lines of the files by band; raises ValueError or FileNotFoundError."""
    changes = {}
    for text in texts:
        band, _, name = text.partition("=")
        if band not in BANDS or not name:
            raise ValueError(f"--changed {text!r}: expected BAND=FILE, with one of the bands {', '.join(BANDS)}")
        changes[band] = Path(name).read_text(encoding="utf-8").splitlines()
    return changes


class ControlComparison:
    """What all controls have in common; raises DataError, FileNotFoundError, ImportError, ValueError.

    A variant that was measured under the same circumstances before is read from the folder `kept`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.sampling = args, read_sampling(args)
        self.changes, self.sizes = read_changes(args.changed), [read_size(text) for text in args.more_sizes]
        self.teacher, self.net = Teacher(args.teacher, torch.device(args.device)), load_feature_net()
        self.branches = read_branches(args.controls, self.teacher)
        self.files = dict(zip(self.branches, args.controls, strict=True))
        self.students = read_students(args.students, self.teacher)
        self.judges, self.missing = self.list_judges()
        cache = args.out / "cache"
        self.held_out = open_held_out(args.held_out, self.teacher, cache, args.size, args.skip, args.count)
        self.kept = Kept(args.out / "kept", describe_circumstances(args, self.held_out, name_code(CODE)))

    def list_judges(self) -> tuple[dict, dict[str, str]]:
        """Functions by what they need, the scorer's by aspect, and by name why a metric is missing."""
        judges, missing = list_judges(None, self.args.clip_weights, self.args.clip_model)
        del judges["alone"]["features"]  # whole sets of pictures are not compared here
        if self.args.scorer is not None:
            scorer = load_prompt_scorer(self.args.scorer)
            del missing["prompt score"]

            def score(pictures: Tensor, captions: list[str]) -> Tensor:
                found = scorer.score_aspects(pictures, captions)
                return torch.stack([found[aspect] for aspect in ASPECTS], 1)

            judges["alone"]["aspects"] = score
        return judges, missing

    def list_models(self) -> Iterator[Variant]:
        """The teacher and the students, unsteered."""
        yield Variant("teacher")
        for file, student in self.students.items():
            yield Variant(file.stem, student, identity=name_file(file), inside=self.args.accelerate)

    def list_variants(self, branch: FrozenBranch, strengths: list[float]) -> Iterator[tuple[Variant, str]]:
        """Each model unsteered and at all strengths, and the name of the teacher's variant that it is compared with."""
        control = name_file(self.files[branch.band])
        for model in self.list_models():
            yield replace(model, name=model.name + FREE), f"teacher{FREE}"
            for strength in strengths:
                name, identity = f"strength {strength:g}", f"{model.identity} {control}"
                steered = replace(
                    model, name=f"{model.name}, {name}", branch=branch, strength=strength, identity=identity
                )
                yield steered, f"teacher, {name}"

    def draw(self, branch: FrozenBranch, task: Task, scenes: HeldOut, strengths: list[float]) -> Drawn:
        """All variants on one task."""
        found: dict[str, dict[str, Tensor]] = {}
        scenes = replace(scenes, context=self.teacher.encode_prompts(task.prompts).cpu(), prompts=task.prompts)
        where = {"prompts": task.prompts, "captions": task.captions, "size": list(scenes.latents.shape)}
        for variant, rival in self.list_variants(branch, strengths):
            reference = found.get(rival) if variant.student is not None else None
            found[variant.name] = self.kept.get_tensors(
                {**variant.key, **where},
                lambda variant=variant, reference=reference: measure_variant(
                    self.teacher, variant, scenes, task, self.sampling, self.judges, self.net, reference
                ),
            )
            print(f"{branch.band}, {task.name}, {scenes.latents.shape[-1] * 8}: {variant.name}", flush=True)
        return Drawn(branch.band, task, scenes.pictures, scenes.latents, found)

    def draw_all(self) -> list[Drawn]:
        """Every band on its tasks, then the changed prompts at other sizes, at the last strength."""
        drawn, strengths = [], self.args.strengths
        for band, branch in self.branches.items():
            own, changed = keep_prompts(self.held_out.prompts), self.change(band)
            drawn += [self.draw(branch, task, self.held_out, strengths) for task in (own, changed)]
        for size in self.sizes:
            scenes = self.resize(*size)
            for band, branch in self.branches.items():
                drawn.append(self.draw(branch, self.change(band).take(len(scenes)), scenes, strengths[-1:]))
        return drawn

    def change(self, band: str) -> Task:
        prompts = self.held_out.prompts
        if band in self.changes:
            return read_prompts(band, self.changes[band], len(prompts))
        return change_prompts(band, prompts)

    def resize(self, width: int, height: int) -> HeldOut:
        """The first sources at another size in pixels, cut to its shape."""
        taken, count = self.held_out, min(len(self.held_out), self.args.more_count)
        whole = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in taken.pictures[:count]]
        pictures = torch.stack([cut_picture(picture, width, height) for picture in whole])
        latents = torch.cat([self.teacher.encode_picture(part).cpu() for part in pictures.split(self.sampling.batch)])
        return replace(taken, latents=latents, pictures=to_bytes(pictures), prompts=taken.prompts[:count])

    def time_all(self) -> list[dict]:
        """Seconds of a UNet step of each model, free and steered by the first control, and the memory it takes."""
        args, teacher, name = self.args, self.teacher, self.args.teacher.name
        if not args.rounds:
            return []
        branch = next(iter(self.branches.values()))
        variants = [variant for variant, _ in self.list_variants(branch, [1.0])]
        if args.time_checkpoint is not None:
            teacher, name = Teacher(args.time_checkpoint, teacher.device), args.time_checkpoint.name
        settings = {"checkpoint": name, "architecture": teacher.architecture.label, "batch": 2, "rounds": args.rounds}
        timed = []
        for size in args.time_size or [args.size]:
            times = time_subjects(
                teacher, [variant.on() for variant in variants], size, 2, args.rounds, precision=args.precision
            )
            memory = measure_memory(teacher, variants, size, 2, args.precision)
            timed.append({**settings, "size": size, "variants": {n: times[n] | memory[n] for n in times}})
        return timed

    def check_zero(self) -> dict[str, bool]:
        """By band, whether strength 0 is the uncontrolled model to the bit."""
        sources, context = self.held_out.latents[:4], self.held_out.context[:4]
        return {band: is_uncontrolled(self.teacher, b, sources, context) for band, b in self.branches.items()}


def evaluate(args: argparse.Namespace) -> list[Path]:
    """Measure what is not measured yet, and write what was found; its files."""
    comparison = ControlComparison(args)
    settings = {
        "teacher": args.teacher.name,
        "architecture": comparison.teacher.architecture.label,
        "sampler": "Euler",
        **asdict(comparison.sampling),
        "size": args.size,
        "held_out_pairs": f"{args.skip} to {args.skip + args.count - 1}",
        "controls": {file.name: name_file(file) for file in args.controls},
        "students": {file.name: name_file(file) for file in args.students},
        "accelerate": args.accelerate,
        "strength_0_is_uncontrolled": comparison.check_zero(),
    }
    drawn, record = comparison.draw_all(), describe_run(comparison.teacher.device)
    findings = Findings(record, settings, drawn, comparison.time_all(), comparison.missing)
    return write_findings(findings, comparison.teacher, args.out, args.picks)


def main(arguments: Sequence[str] | None = None) -> None:
    run_command("control evaluate", evaluate, read_arguments(arguments))
