"""DKD Training Record: losses, samples and figures of a training, while it runs and ever after, from its journal."""

import glob
import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from .model_folders import CONTROLS, STUDENTS
from .pixels import to_images
from .tables import MISSING, Table, show_number, show_report, show_text
from .train_curve import draw_curve, open_sheet
from .train_journal import Progress, read_entries, read_progress, show_duration

NOTHING = "no training yet"
ENDS = {"end": "finished", "stop": "stopped", "error": "failed"}
UNKNOWN = "running, or killed"


@dataclass(frozen=True)
class Training:
    """What a training wrote: its journal, beside it the sheets, and once it is finished the record."""

    name: str
    journal: Path
    record: Path

    def find_time(self) -> int | None:
        """When the trainer last wrote, in ns; None where the run has been deleted meanwhile."""
        try:
            return self.journal.stat().st_mtime_ns
        except OSError:
            return None

    def read_record(self) -> dict[str, Any]:
        """The trainer's summary without the command, which names folders of the server; empty before the end."""
        record = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        record.pop("command", None)
        return record


class TrainingRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DKDTrainingRecord",
            display_name="DKD Training Record",
            category="DHA/train",
            description="Shows losses, samples and figures of a training from what it wrote: of one that runs, was "
            "stopped or is long finished, by DKD Train or by python -m dkd_trainer, of a student or of a frequency "
            "control.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "training",
                    options=[*find_trainings()] or [NOTHING],
                    tooltip="The newest first: those of DKD Train as student/run, from output/dkd; those of the shell "
                    "by the file's name, where it was written to models/dha or models/dha_control. Press R to see new "
                    "ones.",
                )
            ],
            outputs=[
                io.Image.Output("curve", display_name="loss_curve", tooltip="Losses over the steps."),
                io.Image.Output(
                    "sheet",
                    display_name="samples",
                    tooltip="Rows of teacher, student and four times their difference, same prompts and seeds. Of a "
                    "control: source, its band, drawn without and with it.",
                ),
                io.String.Output("report", display_name="report", tooltip="The figures as JSON, for Save DHA Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, training):
        found = find_trainings().get(training)
        return str(found and found.find_time())

    @classmethod
    def execute(cls, training) -> io.NodeOutput:
        found = find_trainings().get(training)
        if found is None:
            raise ValueError(
                f"DKD Training Record found no training {training!r}; run DKD Train, or python -m dkd_trainer with "
                "--out in ComfyUI's models/dha (of a control: models/dha_control), then press R and choose it"
            )
        progress = read_progress(found.journal) or Progress()
        report = describe(found, progress)
        outputs, shown = show_training(cls, found, report, f"{report['state']}: {progress.describe()}")
        return io.NodeOutput(*outputs, ui=shown)


def find_trainings() -> dict[str, Training]:
    """Every training that left a journal where its student or control belongs, by name, the newest first.

    Of several with the same name, in several folders of models, the newest counts.
    """
    runs = list_journals(Path(folder_paths.get_output_directory()), "dkd/*/*")
    found = [
        Training(f"{path.parts[-3]}/{path.parts[-2]}", path, path.with_name(f"{path.parts[-3]}.json")) for path in runs
    ]
    for kind, mark in ((STUDENTS, ""), (CONTROLS, " (control)")):
        for folder in map(Path, folder_paths.get_folder_paths(kind)):
            for path in list_journals(folder, "*.work"):
                name = path.parent.stem
                found.append(Training(f"{name}{mark}", path, folder / f"{name}.json"))
    dated = [(when, training) for training in found if (when := training.find_time()) is not None]
    trainings: dict[str, Training] = {}
    for _, training in sorted(dated, key=itemgetter(0), reverse=True):
        trainings.setdefault(training.name, training)
    return trainings


def list_journals(folder: Path, runs: str) -> list[Path]:
    """The journals of the runs below a folder that a pattern fits; a folder that vanishes meanwhile has none."""
    return [folder / found for found in glob.glob(f"{runs}/journal.jsonl", root_dir=folder)]


def describe(training: Training, progress: Progress) -> dict[str, Any]:
    """The report of a training: what its journal says last, and its record."""
    last = [entry["event"] for entry in read_entries(training.journal)][-1:]
    state = ENDS.get(last[0]) if last else None
    journal = {"state": state or UNKNOWN, "step": progress.step, "steps": progress.total}
    journal["validation"] = progress.validation
    return {"training": training.name, **journal, **training.read_record()}


def show_training(cls, training: Training, report: dict[str, Any], summary: str) -> tuple:
    """Curve, samples and report as outputs; the report comes with what the browser gets."""
    progress = read_progress(training.journal) or Progress()
    title = training.name.partition("/")[0]
    curve, sheet = (to_images([picture]) for picture in (draw_curve(progress, title), open_sheet(progress)))
    text, shown = show_report(report, summary, tabulate(report))
    show_text(cls.hidden.unique_id, summary)
    previews = [ui.PreviewImage(picture, cls=cls).as_dict() for picture in (curve, sheet)]
    images = [image for preview in previews for image in preview["images"]]
    return (curve, sheet, text), {**previews[0], **shown, "images": images}


def tabulate(report: dict[str, Any]) -> Table:
    """Rows for the browser."""
    return [
        ["", "training"],
        ["steps", str(report.get("steps", MISSING))],
        ["pictures or prompts", str(report.get("pairs", MISSING))],
        ["trained parameters", str(report.get("parameters", MISSING))],
        ["time of the steps", show_duration(report.get("seconds") or 0)],
        ["images/s", show_number(report.get("images_per_second"), 1)],
        *list_errors(report.get("validation") or {}),
    ]


def list_errors(validation: dict[str, float]) -> Table:
    """A student's mean held-out error, or all errors of a control, which has no mean."""
    if "mean" in validation or not validation:
        return [["held-out error", show_number(validation.get("mean"), 4)]]
    return [[f"held-out error, {name}", show_number(value, 4)] for name, value in validation.items()]
