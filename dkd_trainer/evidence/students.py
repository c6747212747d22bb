"""Student files and the training-free form as subjects of an evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dha.checkpoint import check_architecture, load_student
from dha.presets import NO_CAP, OWN, PRESETS, Preset, Stretch
from dha.student import FREE_CONFIG, Student

from ..engine.imitation import student_options
from ..host import Teacher
from .kept import name_file
from .peers import percent
from .subject import Subject

TRAINING_FREE = "DHA, training-free"
MIDDLE = "preset balanced"


def read_students(files: list[Path], teacher: Teacher) -> dict[Path, Student]:
    """The students by file; raises StudentFileError for a wrong one or one of another architecture."""
    students = {}
    for file in files:
        students[file] = load_student(file, head_width=teacher.head_width).to(teacher.device)
        check_architecture(file.name, students[file].architecture, teacher.architecture)
    return students


def peer_levels(students: dict[Path, Student]) -> tuple[int, ...]:
    """The levels at which peers are compared: those of the first hybrid student, the finest without any."""
    hybrid = [student.config.levels for student in students.values() if student.config.mode == "hybrid"]
    return hybrid[0] if hybrid else (0,)


class Spending(NamedTuple):
    """How much of the exactness is given away, with what its subjects' names, families and points are marked with."""

    name: str
    family: str
    label: str
    preset: Preset


def spend_budget(budget: float) -> Spending:
    """A share of the keys, in all steps and at every size."""
    return Spending(f"{100 * budget:.4g} % of the keys", "", percent(budget), Preset((Stretch(budget, NO_CAP),)))


def spend_landmarks(budget: float, landmarks: int) -> Spending:
    """A share of the keys with that many landmarks at most, in all steps."""
    name = f"{spend_budget(budget).name}, {landmarks} landmarks"
    return Spending(name, ", landmarks", f"{landmarks}", Preset((Stretch(budget, NO_CAP, landmarks=landmarks),)))


def spend_until(budget: float, end: float) -> Spending:
    """A share of the keys in the steps before `end`, all keys in those after it."""
    name = f"{spend_budget(budget).name} until {100 * end:.4g} %"
    return Spending(name, ", exact in the end", percent(end), Preset((Stretch(budget, NO_CAP, end),)))


def spend_stretches(preset: Preset) -> Spending:
    """Shares of the keys that change while it samples."""
    parts = [f"{100 * s.token_budget:.4g} % until {100 * s.end:.4g} %" for s in preset.stretches]
    plain = [", plain" if not s.trained else "" for s in preset.stretches]
    name = "; ".join(a + b for a, b in zip(parts, plain, strict=True))
    return Spending(name, ", stretches", ", ".join(percent(s.token_budget) for s in preset.stretches), preset)


def list_spendings(
    own: float, budgets: list[float] | None, ends: list[float], landmarks: list[int], more: list[Spending]
) -> list[Spending]:
    """What a student is evaluated at: the budgets or its own one; that until each end, with `landmarks`; and `more`."""
    first = [*(spend_budget(b) for b in budgets or [own]), *(spend_until(own, end) for end in ends)]
    return [*first, *(spend_landmarks(own, number) for number in landmarks), *more]


def list_students(
    students: dict[Path, Student],
    budgets: list[float] | None,
    ends: Sequence[float] = (),
    presets: bool = False,
    stretches: Sequence[Preset] = (),
    landmarks: Sequence[int] = (),
) -> list[Subject]:
    """Each student as `list_spendings` says, after the training-free form of the same.

    Students of mode `official` have no budget and come once.
    """
    more = [Spending(f"preset {name}", ", presets", name, p) for name, p in PRESETS.items() if presets]
    further = (budgets, list(ends), list(landmarks), [*more, *map(spend_stretches, stretches)])
    own = dict.fromkeys(s.config.token_budget for s in students.values() if s.config.mode == "hybrid")
    spendings = dict.fromkeys(spending for budget in own or [0.125] for spending in list_spendings(budget, *further))
    subjects = [training_free(peer_levels(students), spending) for spending in spendings]
    for file, student in students.items():
        if student.config.mode == "official":
            subjects.append(describe(file, student, None))
        else:
            subjects += [describe(file, student, s) for s in list_spendings(student.config.token_budget, *further)]
    return subjects


def training_free(levels: tuple[int, ...], spending: Spending) -> Subject:
    """The same context without any training."""
    config = dataclasses.replace(FREE_CONFIG, levels=levels)

    def build(stretch: Stretch, teacher: Teacher, _side: int) -> dict:
        return student_options(Student(config, teacher.architecture), stretch)

    name, family = f"{TRAINING_FREE}, {spending.name}", TRAINING_FREE + spending.family
    first = Subject(name, family, label=spending.label, identity=config.to_json(), is_dha=True)
    return stretch_subject(first, spending.preset, build)


def describe(file: Path, student: Student, spending: Spending | None) -> Subject:
    """A student's file as a subject; one of mode `official` spends nothing.

    Shown are a student at its own budget and at the preset in the middle, whichever comes last.
    """
    name, family, label, shown = file.stem, file.stem, "official", True
    preset = Preset((OWN,))
    if spending is not None:
        name, family, label = f"{file.stem}, {spending.name}", file.stem + spending.family, spending.label
        shown = spending.name in (spend_budget(student.config.token_budget).name, MIDDLE)
        preset = spending.preset

    def build(stretch: Stretch, teacher: Teacher, _side: int) -> dict:
        return student_options(fit_student(student, teacher), stretch)

    attributes = student.list_attributes([site.block for site in student.list_sites()])
    kept = {"identity": name_file(file), "attributes": attributes}
    first = Subject(name, family, label=label, is_dha=True, is_shown=shown, **kept)
    return stretch_subject(first, preset, build)


def stretch_subject(first: Subject, preset: Preset, build: Callable[[Stretch, Teacher, int], dict]) -> Subject:
    """A subject that goes through the stretches of a preset, each built by `build`."""
    subject = None
    for stretch in reversed(preset.stretches):
        identity = " ".join(map(str, (first.identity, *dataclasses.astuple(stretch))))
        own = {"build": partial(build, stretch), "identity": identity, "end": stretch.end, "then": subject}
        subject = dataclasses.replace(first, **own)
    return subject


def fit_student(student: Student, teacher: Teacher) -> Student:
    """The student itself, or for a teacher of other widths one of its kind with random weights, which is as fast."""
    if student.architecture == teacher.architecture:
        return student
    other = Student(student.config, teacher.architecture, head_width=teacher.head_width)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return other.to(teacher.device).eval().requires_grad_(False)
