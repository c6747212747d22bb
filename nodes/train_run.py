"""Where a training of DKD Train keeps its files, and what its process is told."""

import contextlib
import filecmp
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..dha.whole_file import replace_whole, write_whole
from .model_folders import STUDENTS
from .train_data import Data
from .train_process import TrainerError

PRESETS = Path(__file__).resolve().parent.parent / "dkd_trainer" / "presets"
NAME = re.compile(r"\w[\w .-]{0,79}(?<![ .])")
SHEETS = 5  # of a training whose steps are given
LINES = 1000  # of its journal, at most

Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """What the node's inputs say, beside the models and the data; None leaves a setting to the preset."""

    name: str
    preset: str
    steps: int | None
    size: int | None
    token_budget: float | None
    levels: tuple[int, ...] | None
    batch: int | None
    seed: int

    def list_settings(self) -> Tables:
        """The trainer's settings that are given."""
        tables: Tables = {
            "data": {"size": self.size},
            "student": {"token_budget": self.token_budget, "levels": self.levels},
            "train": {"batch": self.batch, "seed": self.seed},
            "watch": {},
        }
        if self.steps:
            tables["watch"] = {
                "log_every": max(1, self.steps // LINES),
                "sheet_every": max(1, self.steps // SHEETS),
                "validate_every": max(1, self.steps // SHEETS),
            }
        return {
            section: {name: value for name, value in table.items() if value is not None}
            for section, table in tables.items()
        }


@dataclass(frozen=True)
class Run:
    """One training: the same inputs have the same `folder`, so that it goes on where it was stopped."""

    name: str
    folder: Path
    steps: int | None

    @property
    def student(self) -> Path:
        """The student, which the trainer writes before the record about it."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def record(self) -> Path:
        """What the trainer writes about the finished student."""
        return self.student.with_suffix(".json")

    @property
    def is_finished(self) -> bool:
        """Whether the trainer wrote all that it writes; a run that was killed between two files goes on once more."""
        return self.student.is_file() and self.record.is_file()

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher.safetensors"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def installed(self) -> Path:
        """Where Load DHA Student and the user find the student."""
        return Path(folder_paths.get_folder_paths(STUDENTS)[0]) / self.student.name

    def list_arguments(self) -> list[str]:
        """The trainer's command line."""
        steps = ["--steps", str(self.steps)] if self.steps else []
        return ["--config", str(self.folder / "run.toml"), *steps, "--stop-with-parent"]


def list_presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def plan_run(choice: Choice, teacher: str, data: Data) -> Run:
    """The run of these inputs, in ComfyUI's output folder; `teacher` is a hash. Raises ValueError for a wrong name."""
    if not NAME.fullmatch(choice.name):
        raise ValueError(
            f"DKD Train cannot call a student {choice.name!r}; expected letters, digits, spaces, points, dashes and "
            "underscores, a letter or digit first, at most 80"
        )
    preset = (PRESETS / f"{choice.preset}.toml").read_text(encoding="utf-8")
    parts = [teacher, data.key, preset, choice.steps, choice.list_settings()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    folder = Path(folder_paths.get_output_directory()) / "dkd" / choice.name / key
    return Run(choice.name, folder.resolve(), choice.steps)


@contextlib.contextmanager
def occupy(run: Run) -> Iterator[None]:
    """Keep a run's folder to this server while the block lasts, and the teacher in it no longer.

    The teacher is large, and the same graph makes it again. Raises TrainerError while another server has the folder; on
    a file system without locks nothing is kept apart.
    """
    from filelock import FileLock, Timeout

    run.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(run.folder / "server.lock").acquire(blocking=False))
            for leftover in run.folder.glob(f".{run.teacher.name}.*.partial"):  # of a server that was killed
                leftover.unlink()
        except Timeout:
            raise TrainerError(
                f"DKD Train: another ComfyUI with this output folder trains {run.name!r} from the same inputs; wait "
                "for its end and queue again, or choose another name"
            ) from None
        except NotImplementedError:
            pass
        stack.callback(run.teacher.unlink, missing_ok=True)
        yield


def write_settings(run: Run, choice: Choice, data: Data, hardware: dict[str, str]) -> None:
    """Put the trainer's settings, `hardware` among those of `[train]`, and any prompts into the run's folder."""
    source = data.folder or run.folder / "prompts.txt"
    if not data.folder:
        write_whole(source, "".join(f"{prompt}\n" for prompt in data.prompts).encode())
    tables = choice.list_settings()
    tables["teacher"] = {"file": str(run.teacher)}
    tables["data"] |= {"path": str(source), "cache": str(run.folder.parent / "cache")}
    tables["train"] |= hardware
    tables["output"] = {"file": str(run.student), "work": str(run.folder)}
    lines = [f"preset = {json.dumps(choice.preset)}"]
    for section, values in tables.items():
        # numbers, texts and lists of them are in TOML what they are in JSON, but for surrogates
        lines += [f"[{section}]", *(f"{name} = {json.dumps(v, ensure_ascii=False)}" for name, v in values.items())]
    write_whole(run.folder / "run.toml", "\n".join([*lines, ""]).encode())


def check_place(run: Run) -> None:
    """Raise ValueError where a student lies that no training of this name made: it would be lost, or never found."""
    ours = list(run.folder.parent.glob(f"*/{run.student.name}"))
    for folder in folder_paths.get_folder_paths(STUDENTS):
        found = Path(folder, run.student.name)
        if found.exists() and not any(filecmp.cmp(found, each, shallow=False) for each in ours):
            raise ValueError(
                f"DKD Train: Load DHA Student already has a {found.name} that was not trained here; choose another "
                "name, or move that file away"
            )


def install_student(run: Run) -> Path:
    """Put the finished student into models/dha; its path there."""
    if not (run.installed.exists() and filecmp.cmp(run.installed, run.student, shallow=False)):
        run.installed.parent.mkdir(parents=True, exist_ok=True)
        with replace_whole(run.installed) as partial:
            shutil.copyfile(run.student, partial)
    return run.installed
