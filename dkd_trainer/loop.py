"""The training loop: stage 1, then stage 2; stops and goes on at any step, writes the student's file."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dha.checkpoint import save_student
from dha.config import DHAConfig
from dha.student import Student

from .diffusion import add_noise
from .host import ROOT, Teacher
from .imitation import imitation_losses
from .schedule import cosine_rate, load_state, save_state
from .transfer import transfer_losses

BUDGETS = (
    0.5,
    1.0,
    1.0,
    2.0,
)  # factors of the token budget that training draws from, so that one student serves a range


@dataclass(frozen=True)
class Run:
    """Everything that decides a training; a state of another run is not continued."""

    config: DHAConfig
    transfer_steps: int
    imitation_steps: int
    batch: int
    transfer_rate: float = 2e-3
    imitation_rate: float = 5e-4
    routing_weight: float = 0.1
    seed: int = 0
    save_every: int = 100

    @property
    def steps(self) -> int:
        return self.transfer_steps + self.imitation_steps


def train_student(teacher: Teacher, pairs: dict[str, Tensor], run: Run, out: Path, state_file: Path) -> Student:
    """Distil a student from encoded pairs; the same call resumes from `state_file`. Raises FloatingPointError on NaN.

    `out` is written at the end with the averaged weights.
    """
    torch.manual_seed(run.seed)
    student = Student(run.config, teacher.architecture).start().to(teacher.device)
    average = Student(run.config, teacher.architecture).to(teacher.device).requires_grad_(False)
    average.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=run.transfer_rate, betas=(0.9, 0.99), weight_decay=0.0)
    first, history = 0, []
    identity = json.dumps(asdict(run), sort_keys=True)
    if state := load_state(state_file):
        if state["run"] != identity:
            raise ValueError(
                f"{state_file} belongs to a run with other settings; give another --work folder or delete it"
            )
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, history = state["step"], state["history"]

    def save(step: int) -> None:
        weights = {
            "student": student.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save_state(state_file, {**weights, "step": step, "history": history, "run": identity})

    bar = tqdm(range(first, run.steps), initial=first, total=run.steps, desc="distil", disable=first >= run.steps)
    step = first
    try:
        for step in bar:
            set_rate(optimizer, run, step)
            losses = draw_losses(teacher, student, pairs, run, step)
            total = sum(
                value * (run.routing_weight if name.endswith("/routing") else 1.0) for name, value in losses.items()
            )
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"the loss is {total.item()} at step {step}; the state of the last save is kept"
                )
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 0.01 if step > 50 else 0.2)
            summary = summarise(losses)
            bar.set_postfix({k: f"{v:.4f}" for k, v in summary.items()}, refresh=False)
            if step % 10 == 0:
                history.append({"step": step, **summary})
            if (step + 1) % run.save_every == 0:
                save(step + 1)
    except KeyboardInterrupt:
        save(step)
        raise
    save(run.steps)
    save_student(out, average, teacher.fingerprint, teacher.prediction, training_record(teacher, pairs, run, history))
    return average.eval()


def set_rate(optimizer: torch.optim.Optimizer, run: Run, step: int) -> None:
    """Cosine with warm-up, started anew at each stage."""
    if step < run.transfer_steps:
        rate = run.transfer_rate * cosine_rate(step, run.transfer_steps, warmup=min(50, run.transfer_steps))
    else:
        inside = step - run.transfer_steps
        rate = run.imitation_rate * cosine_rate(inside, run.imitation_steps, warmup=min(50, run.imitation_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def draw_losses(teacher: Teacher, student: Student, pairs: dict[str, Tensor], run: Run, step: int) -> dict[str, Tensor]:
    """Losses of one batch; pairs, noise, timesteps and budget depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    picks = torch.randint(len(pairs["latents"]), (run.batch,), generator=generator)
    latents, context = pairs["latents"][picks].float(), pairs["context"][picks].float()
    empty = torch.rand(run.batch, generator=generator) < 0.2  # guidance runs the empty prompt as often as the other
    context[empty] = pairs["empty"].float()
    t = torch.randint(0, 1000, (run.batch,), generator=generator)
    noisy = add_noise(latents, torch.randn(latents.shape, generator=generator), t)
    factor = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=generator))]
    budget = min(1.0, run.config.token_budget * factor)
    stage = transfer_losses if step < run.transfer_steps else imitation_losses
    device = teacher.device
    torch.manual_seed(run.seed * 1_000_003 + step)
    return stage(teacher, student, noisy.to(device), t.to(device), context.to(device), budget)


def summarise(losses: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss per term: `attention` and `routing` in stage 1, `output` in stage 2."""
    groups: dict[str, list[float]] = {}
    for name, value in losses.items():
        term = name if name == "output" else "routing" if name.endswith("/routing") else "attention"
        groups.setdefault(term, []).append(value.item())
    return {term: sum(values) / len(values) for term, values in groups.items()}


def training_record(teacher: Teacher, pairs: dict[str, Tensor], run: Run, history: list[dict]) -> dict:
    """What the student's file remembers of its training."""
    last = {k: v for entry in history for k, v in entry.items() if k != "step"}
    return {"run": asdict(run), "pairs": len(pairs["latents"]), "last_losses": last, "commit": current_commit()}


def current_commit() -> str:
    """The repository's commit, or `unknown` outside one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def current_command(module: str) -> str:
    """The command line that runs now, with absolute paths cut to their last part: it goes into records for others."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return " ".join(["python -m", module, *arguments])
