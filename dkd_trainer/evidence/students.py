"""Student files and the training-free form as subjects of an evaluation."""

from pathlib import Path

import torch

from dha.checkpoint import check_architecture, load_student
from dha.config import DHAConfig
from dha.student import Student

from ..engine.imitation import student_options
from ..host import Teacher
from .kept import name_file
from .peers import percent
from .subject import Subject

TRAINING_FREE = "DHA, training-free"


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


def list_students(students: dict[Path, Student], budgets: list[float] | None) -> list[Subject]:
    """Each student at its own or the given budgets, after the training-free form at the same ones.

    Students of mode `official` have no budget and come once.
    """
    levels, own = peer_levels(students), [s.config.token_budget for s in students.values() if s.config.mode == "hybrid"]
    free = [training_free(levels, budget) for budget in budgets or dict.fromkeys(own or [0.125])]
    subjects = []
    for file, student in students.items():
        if student.config.mode == "official":
            subjects.append(describe(file, student, None))
        else:
            subjects += [describe(file, student, budget) for budget in budgets or [student.config.token_budget]]
    return [*free, *subjects]


def training_free(levels: tuple[int, ...], budget: float) -> Subject:
    """The same context without any training; `identity` is its configuration as JSON."""
    config = DHAConfig(levels=levels, token_budget=budget)

    def build(teacher: Teacher, _side: int) -> dict:
        return student_options(Student(config, teacher.architecture))

    return Subject(
        name_budget(TRAINING_FREE, budget), TRAINING_FREE, build, percent(budget), config.to_json(), is_dha=True
    )


def name_own(file: Path, student: Student) -> str:
    """The name of the subject that is a student at its own budget."""
    return file.stem if student.config.mode == "official" else name_budget(file.stem, student.config.token_budget)


def describe(file: Path, student: Student, budget: float | None) -> Subject:
    """A student's file as a subject."""
    name = file.stem if budget is None else name_budget(file.stem, budget)
    label = "official" if budget is None else percent(budget)

    def build(teacher: Teacher, _side: int) -> dict:
        return student_options(fit_student(student, teacher), budget)

    attributes = student.list_attributes([site.block for site in student.list_sites()])
    return Subject(name, file.stem, build, label, f"{name_file(file)} {budget}", attributes=attributes, is_dha=True)


def name_budget(name: str, budget: float) -> str:
    return f"{name}, {100 * budget:.4g} % of the keys"


def fit_student(student: Student, teacher: Teacher) -> Student:
    """The student itself, or for a teacher of other widths one of its kind with random weights, which is as fast."""
    if student.architecture == teacher.architecture:
        return student
    other = Student(student.config, teacher.architecture, head_width=teacher.head_width)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return other.to(teacher.device).eval().requires_grad_(False)
