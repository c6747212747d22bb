"""Where a student's weights come from when they are not fresh."""

import dataclasses
from pathlib import Path

from dha.checkpoint import check_architecture, load_student
from dha.config import DHAConfig
from dha.student import Student

from ..fields import SettingsError
from ..host import Teacher
from .state import list_differences

SPENDING = ("token_budget", "max_tokens")  # no weight has a shape from these


def read_start(path: Path, config: DHAConfig, teacher: Teacher) -> Student:
    """The student of a file, to be trained on with the settings of `config`.

    Raises SettingsError when its parts are not those of the settings, StudentFileError when it is no student.
    """
    if not path.is_file():
        raise SettingsError(f"setting 'start' is {str(path)!r}, which does not exist; expected a student file")
    found = load_student(path)
    before, now = (dataclasses.asdict(each) for each in (found.config, config))
    differences = list_differences(*({k: v for k, v in each.items() if k not in SPENDING} for each in (before, now)))
    if differences:
        raise SettingsError(
            f"{path.name} cannot start a student of these settings: {'; '.join(differences[:3])}; set [student] to "
            "what the file has, or start without it"
        )
    check_architecture(path.name, found.architecture, teacher.architecture)
    student = Student(config, teacher.architecture, head_width=teacher.head_width)
    student.load_state_dict(found.state_dict())
    return student
