"""The training loop: through the stages, safe to stop and to go on at any step, to the student's file."""

import dataclasses
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dha.checkpoint import save_student
from dha.student import Student
from dha.whole_file import write_whole

from ..data.batches import Batch, Corpus, Sampler
from ..fields import SettingsError
from ..host import Teacher, hash_weights
from ..record import current_command, current_commit, list_versions
from ..settings import Settings
from .journal import Board, Journal
from .official import start_student
from .origin import read_start
from .processes import Processes
from .sheets import Examination, save_picture, set_aside
from .stages import Balance, Stage, find_stage, list_stages
from .state import StateFolder, StopRequest, TrainingStopped, to_cpu


def train_student(
    teacher: Teacher,
    corpus: Corpus,
    settings: Settings,
    processes: Processes | None = None,
    held_out: Corpus | None = None,
) -> Student:
    """Distil a student and write its file, its settings and its record; the same call goes on where it was stopped.

    Raises TrainingStopped on SIGINT and SIGTERM, FloatingPointError on NaN, OSError on a full disk, ValueError for a
    work folder of another run; in each case the last state is kept.
    """
    processes = processes or Processes(settings.train)
    return Training(teacher, corpus, settings, processes, held_out).run()


class Training:
    """A student with its average and optimizer, and the step that changes them."""

    origin = ""  # a hash of the weights that the student started with, where they are a file's

    def __init__(
        self,
        teacher: Teacher,
        corpus: Corpus,
        settings: Settings,
        processes: Processes,
        held_out: Corpus | None = None,
    ):
        self.teacher, self.corpus, self.settings, self.processes = teacher, corpus, settings, processes
        self.stages = self.list_stages()
        torch.manual_seed(settings.train.seed)
        self.student, self.average = (self.build_student().to(teacher.device) for _ in range(2))
        self.average.requires_grad_(False).load_state_dict(self.student.state_dict())
        self.parameters = list(self.student.parameters())
        if not self.parameters:
            raise SettingsError("the student has no trained parts; set student.memory, student.rank or .router_width")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.balance = Balance()
        watch = settings.watch
        watched = held_out is None and (watch.validate_every or watch.sheet_every)
        self.aside = set_aside(corpus, watch.pairs, settings.train.seed) if watched else []
        self.sampler = Sampler(
            corpus, settings, self.student if isinstance(self.student, Student) else None, self.aside
        )
        self.examination = self.prepare_examination(held_out)
        self.states = StateFolder(settings.work, settings.output.keep)
        self.journal = Journal(settings.work / "journal.jsonl")
        self.losses: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.examined = False  # whether the last step was
        self.seconds = self.waited = self.pace = 0.0  # of all steps, waiting for batches, of a step lately

    def list_stages(self) -> list[Stage]:
        """What is learnt, in order."""
        return list_stages(self.settings)

    def build_student(self) -> nn.Module:
        """What is trained, at its start; the seed is set."""
        if self.settings.start:
            student = read_start(Path(self.settings.start), self.settings.student, self.teacher)
            self.origin = hash_weights(student.named_weights())
            return student
        student = Student(self.settings.student, self.teacher.architecture, head_width=self.teacher.head_width)
        return start_student(student, self.teacher)

    def prepare_examination(self, held_out: Corpus | None) -> Examination | None:
        """The pairs that the student is looked at with, or None where there are too few."""
        watch, corpus = self.settings.watch, self.corpus if held_out is None else held_out
        picks = self.aside if held_out is None else max(held_out.buckets.values(), key=len)[: watch.pairs]
        return self.make_examination(corpus, picks) if picks and self.processes.is_first else None

    def make_examination(self, corpus: Corpus, picks: list[int]) -> Examination:
        return Examination(self.teacher, corpus, picks, self.settings.watch, self.processes.size)

    def restore(self) -> int:
        """Take over the last state, if there is one; returns the steps done."""
        state = self.processes.hand_out(self.load_state() if self.processes.is_first else None)
        if state is None:
            return 0
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balance = Balance(state["balance"])
        self.losses, self.errors = state["losses"], state["errors"]
        self.seconds, self.waited = state["seconds"], state["waited"]
        self.examined = state["examined"]
        return state["step"]

    def load_state(self) -> dict[str, Any] | None:
        """The last state of this very run; settings that are newer than it had their defaults then."""
        return self.states.load(self.describe(), type(self.settings)().describe_run())

    def save(self, step: int) -> None:
        """Write a state after `step` steps; only the first process does."""
        if not self.processes.is_first:
            return
        weights = {name: to_cpu(getattr(self, name).state_dict()) for name in ("student", "average", "optimizer")}
        values = {name: getattr(self, name) for name in ("losses", "errors", "seconds", "waited", "examined")}
        file = self.states.save(step, {**weights, **values, "balance": self.balance.sizes, "run": self.describe()})
        self.journal.write("save", step=step, file=file.name)

    def describe(self) -> dict[str, Any]:
        """What a state must agree with; plain values as JSON has them."""
        begun = {"start": self.origin} if self.origin else {}
        pairs = {"pairs": self.corpus.identity, "aside": self.aside}
        taught = {"teacher": self.teacher.fingerprint, "weights": self.teacher.describe_weights()}
        run = {**self.settings.describe_run(), **begun, **pairs, **taught}
        return json.loads(json.dumps(run))

    def read_step(self, step: int) -> list[Batch]:
        """This process's parts of a step's batch."""
        draw = self.sampler.draw(step, find_stage(self.stages, step).guidance)
        return [self.sampler.read(draw, part, self.teacher.device) for part in self.processes.list_parts()]

    def take_step(self, step: int, parts: list[Batch], signal_number: int = 0) -> bool:
        """One change of the weights; leaves the terms in `losses`. Returns whether any process was asked to stop.

        Raises FloatingPointError, before anything is changed, when a loss or a gradient is no number.
        """
        stage, train = find_stage(self.stages, step), self.settings.train
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        factors = self.balance.weigh(stage, step)
        sums: dict[str, torch.Tensor] = {}
        for part in parts:
            with self.lower_precision():
                terms = stage.measure(self.teacher, self.student, part, train.checkpointing)
            total = sum(factors[name] * value for name, value in terms.items()) / len(parts)
            total.backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(parts)
        self.processes.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, train.clip or float("inf"))
        told = torch.stack([*sums.values(), norm, torch.full_like(norm, float(signal_number))])
        *values, size, asked = self.processes.average(told.float()).tolist()
        self.losses = dict(zip(sums, values, strict=True))
        if not torch.isfinite(torch.tensor([*values, size])).all():
            found = ", ".join(f"{name} {value:g}" for name, value in self.losses.items())
            raise FloatingPointError(
                f"no finite numbers at step {step} ({found}, gradient {size:g}); the last saved state is kept; try a "
                "lower learning rate or fp32, with another --work folder"
            )
        self.optimizer.step()
        decay = min(train.ema, (step + 1) / (step + 10))
        with torch.no_grad():  # or the average would carry the graph of every step so far
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)
        self.balance.follow(stage, self.losses)
        return asked > 0

    def lower_precision(self) -> torch.autocast:
        """Where the models compute in what the settings say; their weights stay as they are."""
        return torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=self.settings.train.precision == "bf16")

    def run(self) -> Student:
        """All steps that are left, then the files."""
        settings, watch = self.settings, self.settings.watch
        self.processes.require_same(self.describe())
        if self.processes.is_first:
            settings.work.mkdir(parents=True, exist_ok=True)
        first = self.restore()
        if self.processes.is_first:
            self.journal.cut(first)
            self.journal.write("start", step=first, **self.describe_start())
        hidden = first >= settings.steps or not self.processes.is_first
        bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="distil", disable=hidden)
        board = Board(settings.work / "tensorboard", watch.tensorboard and self.processes.is_first, first)
        with StopRequest() as stop, ThreadPoolExecutor(1) as reader, closing(board):
            coming = reader.submit(self.read_step, first) if first < settings.steps else None
            for step in bar:
                begun = time.perf_counter()
                parts = coming.result()
                self.waited += time.perf_counter() - begun
                done, stage = step + 1, find_stage(self.stages, step)
                if done < settings.steps:
                    coming = reader.submit(self.read_step, done)
                stopped = self.take_step(step, parts, stop.number)
                self.seconds += time.perf_counter() - begun
                if self.processes.is_first:
                    self.report(bar, board, stage, done, time.perf_counter() - begun)
                if stopped or done % settings.output.save_every == 0 or done == settings.steps:
                    self.save(done)
                if stopped and done < settings.steps:
                    if self.processes.is_first:
                        self.journal.write("stop", step=done)
                    self.processes.hand_out(None)  # a launcher kills the others once one has ended: not while it writes
                    raise TrainingStopped(done, stop.number or signal.SIGTERM)
                if self.examination and done < settings.steps:
                    self.examine(board, done)
            if self.examination and not self.examined:  # the state is saved: launchers give a process half a minute
                self.examine(board, settings.steps)
                self.examined = True
                self.save(settings.steps)
        if self.processes.is_first:
            self.write_results()
        return self.average.eval()

    def report(self, bar: tqdm, board: Board, stage: Stage, done: int, seconds: float) -> None:
        """Show a step."""
        watch, steps = self.settings.watch, self.settings.steps
        self.pace = 0.9 * (self.pace or seconds) + 0.1 * seconds
        speed = self.settings.train.batch / self.pace
        shown = {name: f"{value:.4f}" for name, value in self.losses.items()}
        bar.set_postfix({**shown, "images/s": f"{speed:.1f}"}, refresh=False)
        if done % watch.log_every == 0 or done in (1, steps, stage.end):
            times = {"images_per_second": round(speed, 3), "seconds_left": round((steps - done) * self.pace, 1)}
            self.journal.write("step", step=done, stage=stage.name, losses=self.losses, **times)
            rate = self.optimizer.param_groups[0]["lr"]
            board.add(stage.name, {**self.losses, "images_per_second": speed, "rate": rate}, done)

    def examine(self, board: Board, done: int) -> None:
        """Validation and sheet, at their intervals and in the end."""
        watch, steps = self.settings.watch, self.settings.steps
        if watch.validate_every and (done % watch.validate_every == 0 or done == steps):
            with self.lower_precision():
                self.errors = self.examination.measure_errors(self.average)
            self.journal.write("validation", step=done, errors=self.errors)
            board.add("validation", self.errors, done)
        if watch.sheet_every and (done % watch.sheet_every == 0 or done == steps):
            sheet = self.examination.draw_sheet(self.average)
            self.teacher.release()
            file = Path("sheets") / f"{done:08d}.png"
            save_picture(self.settings.work / file, sheet)
            self.journal.write("sheet", step=done, file=str(file))
            board.show("sheet", sheet, done)

    def describe_start(self) -> dict[str, Any]:
        """The `start` event: how long it will take and what is trained."""
        stages = [{"name": stage.name, "first": stage.first, "steps": stage.settings.steps} for stage in self.stages]
        count = sum(parameter.numel() for parameter in self.parameters)
        values = {"pairs": len(self.corpus), "processes": self.processes.count}
        settings = dataclasses.asdict(self.settings)
        return {"steps": self.settings.steps, "stages": stages, "parameters": count, **values, "settings": settings}

    def write_results(self) -> None:
        """The student with its averaged weights, and beside it the settings as TOML and the record as JSON."""
        out, run = self.settings.out, self.describe()
        summary = {"pairs": len(self.corpus), "last_losses": self.losses, "commit": current_commit()}
        save_student(out, self.average, self.teacher.fingerprint, self.teacher.prediction, {"run": run, **summary})
        write_whole(out.with_suffix(".toml"), self.settings.to_toml().encode())
        rate = self.settings.train.batch * self.settings.steps / self.seconds if self.seconds else None
        record = {
            "command": current_command("dkd_trainer"),
            **summary,
            "validation": self.errors,
            "steps": self.settings.steps,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "seconds": round(self.seconds, 1),
            "images_per_second": rate,
            "share_of_waiting": self.waited / self.seconds if self.seconds else None,
            "device": str(self.teacher.device),
            "processes": self.processes.count,
            "versions": list_versions(),
            "run": run,
        }
        write_whole(out.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
        self.journal.write("end", step=self.settings.steps, student=str(out))
