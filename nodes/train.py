"""DKD Train: distils a student of the connected checkpoint in a process of its own, and hands it to Apply DHA."""

import re
import time
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from .apply import RANGES
from .export_teacher import check_teacher, collect_weights, hash_weights, write_checkpoint
from .load import DHA_STUDENT, load_into_host
from .tables import show_text
from .train_curve import draw_curve, join, open_sheet
from .train_data import Data, find_data
from .train_journal import Progress, read_failure, read_progress
from .train_process import TrainerError, TrainerProcess, check_needs, read_tail
from .train_run import Choice, Run, check_place, install_student, list_presets, occupy, plan_run, write_settings
from .training_record import Training, show_training

PRESET = "preset"
LEVELS: dict[str, tuple[int, ...] | None] = {PRESET: None, **RANGES}
PREVIEW = 768  # pixels
INTERVAL = 0.5  # seconds between two looks at the journal
REDRAW = 3.0  # seconds between two pictures of the curve


class DKDTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DKDTrain",
            display_name="DKD Train",
            category="DHA/train",
            description="Trains a DHA student of the connected Stable Diffusion 2.x checkpoint, LoRAs included, in a "
            "process of its own. Cancel saves; queue again to go on. What is trained already is not trained again.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher, from a loader or after LoRAs, not after Apply DHA."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.String.Input(
                    "name", default="my-student", tooltip="The student's file in models/dha gets this name."
                ),
                io.String.Input(
                    "data_folder",
                    default="",
                    tooltip="A folder below ComfyUI's input folder: pictures beside .txt files of the same name, or "
                    "image/ and prompt/, or .tar shards. Empty: the teacher draws pictures for the prompts below.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt a line, of the kind that you draw with; used where no data folder is named. "
                    "Some hundreds are good, 8 the least for a look at the samples.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list_presets(),
                    default="sd21",
                    tooltip="sd21: the real Stable Diffusion 2.x. mini: the mini model of this pack. official: the "
                    "published distillation, for comparison.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Training steps in all, shared by the stages as in the preset. 0: as many as the preset "
                    "says.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip="Side of the training pictures in pixels. 0: as the preset says (sd21 512, mini 128).",
                ),
                io.Float.Input(
                    "token_budget",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    tooltip="Share of the tokens that are looked at, around which the student is trained. 0: as "
                    "the preset says.",
                ),
                io.Combo.Input(
                    "levels",
                    options=list(LEVELS),
                    default=PRESET,
                    optional=True,
                    tooltip="Resolutions of the UNet that the student replaces; nearly all of the cost is at the "
                    "finest.",
                ),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="Pictures of a step. Fewer need less memory. 0: as the preset says.",
                ),
                # Not `seed`: the browser changes an input of that name after every run, and nothing would go on.
                io.Int.Input(
                    "training_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    tooltip="Decides every draw of the training; the same seed trains the same student.",
                ),
            ],
            outputs=[
                DHA_STUDENT.Output(display_name="student", tooltip="The trained student, for Apply DHA."),
                io.Image.Output("curve", display_name="loss_curve", tooltip="Losses over the steps."),
                io.Image.Output(
                    "sheet",
                    display_name="samples",
                    tooltip="Rows of teacher, student and four times their difference, same prompts and seeds.",
                ),
                io.String.Output("report", display_name="report", tooltip="The record of the training as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, data_folder="", prompts="", **_):
        try:
            return find_data(data_folder or "", prompts or "").key
        except (ValueError, OSError, TrainerError) as error:  # execute says it again, on the node
            return str(error)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        name,
        data_folder,
        prompts,
        preset,
        steps,
        size,
        token_budget=0.0,
        levels=PRESET,
        batch=0,
        training_seed=0,
    ) -> io.NodeOutput:
        check_teacher(model, clip, vae)
        data = find_data(data_folder, prompts)
        given = (steps or None, size or None, token_budget or None, LEVELS[levels], batch or None)
        choice = Choice(name.strip(), preset, *given, training_seed)
        weights = collect_weights(model, clip, vae)
        run = plan_run(choice, hash_weights(weights), data)
        check_place(run)
        trained = not run.is_finished
        if trained:
            check_needs()
            with occupy(run):
                prepare(run, choice, data, weights)
                del weights
                free_models()
                train(run, data, cls.hidden.unique_id)
        student = load_into_host(install_student(run), run.student.name)
        outputs, shown = show_results(cls, run, trained)
        return io.NodeOutput(student, *outputs, ui=shown)


def prepare(run: Run, choice: Choice, data: Data, weights: Mapping[str, torch.Tensor]) -> None:
    """Put all that the trainer reads into the run's folder."""
    write_settings(run, choice, data, choose_hardware())
    if not run.teacher.is_file():
        write_checkpoint(run.teacher, weights)


def choose_hardware() -> dict[str, str]:
    """Settings of `[train]` that the machine decides: CUDA if ComfyUI has it, and fp32 where that has no bf16."""
    if comfy.model_management.get_torch_device().type != "cuda":
        return {"device": "cpu"}
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"device": "auto"} if bf16 else {"device": "auto", "precision": "fp32"}


def free_models() -> None:
    """Give the trainer the memory that ComfyUI's models take."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def train(run: Run, data: Data, node_id: str) -> None:
    """Run the trainer to its end; raises TrainerError, or on cancel what ComfyUI raises, after it has saved."""
    begun = time.time()
    process = TrainerProcess(run.list_arguments(), run.log)
    try:
        Screen(run, data, node_id).follow(process)
        process.check()
    except TrainerError as error:
        raise TrainerError(explain_failure(run, str(error), begun)) from None
    finally:
        stop(process, node_id)
    if not run.is_finished:
        raise TrainerError(f"DKD Train: the trainer ended without a student. The end of its log:\n{read_tail(run.log)}")


def stop(process: TrainerProcess, node_id: str) -> None:
    """Let the trainer end its step and save, if it has not ended yet; a second cancel kills it."""
    process.ask_to_stop()
    while not process.wait(INTERVAL):
        show_text(
            node_id, "stopping: the trainer ends its step and saves; cancel again to lose what came since the last save"
        )
        if comfy.model_management.processing_interrupted():
            process.kill()


def explain_failure(run: Run, message: str, since: float) -> str:
    """What a user needs to know of a trainer that failed."""
    progress = read_progress(run.journal)
    kept = any(run.folder.glob("state-*.pt"))
    note = f" Queue again to go on from its last save (it came to step {progress.step})." if progress and kept else ""
    reason = read_failure(run.journal, since)
    return f"DKD Train: {reason or 'no student was made'}.{note} In detail: {message}"


class Screen:
    """What the browser sees of a run: a line on the node, the progress bar, the curve and the samples."""

    def __init__(self, run: Run, data: Data, node_id: str):
        self.run, self.data, self.node_id = run, data, node_id
        self.bar: comfy.utils.ProgressBar | None = None
        self.drawn = (0.0, -1)  # when, and at which step

    def follow(self, process: TrainerProcess) -> None:
        """Show the run until its process ends; raises what ComfyUI raises on cancel."""
        while not process.wait(INTERVAL):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.show()
        self.show()

    def show(self) -> None:
        """Show how far it is."""
        progress = read_progress(self.run.journal)
        if progress is None or not progress.total:
            last = read_tail(self.run.log, 1)
            doing = re.sub(r"\|.*\|", ",", last) if "%|" in last else "starting the trainer"
            show_text(self.node_id, f"preparing {self.data.describe()}: {doing}")
            return
        show_text(self.node_id, progress.describe())
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(progress.total)
        self.bar.update_absolute(progress.step, progress.total, self.draw(progress))

    def draw(self, progress: Progress) -> tuple[str, Any, int] | None:
        """A new preview where there is something new, at most one every few seconds."""
        before, step = self.drawn
        if progress.step == step or time.monotonic() - before < REDRAW:
            return None
        self.drawn = (time.monotonic(), progress.step)
        curve = draw_curve(progress, self.run.name)
        return "JPEG", join(curve, open_sheet(progress)) if progress.sheet else curve, PREVIEW


def show_results(cls, run: Run, trained: bool) -> tuple:
    """Curve, samples and report of a finished run, as outputs; the report comes with what the browser gets."""
    training = Training(f"{run.name}/{run.folder.name}", run.journal, run.record)
    report = {"student": run.student.name, "trained_now": trained, **training.read_record()}
    return show_training(cls, training, report, summarise(report))


def summarise(report: dict[str, Any]) -> str:
    """One line for the node."""
    place = f"models/dha/{report['student']}"
    if not report["trained_now"]:
        return f"Nothing has changed since it was trained: {place}"
    return f"Trained {report.get('steps', 0)} steps: {place}"
