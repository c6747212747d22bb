"""The training of a control branch on a locked teacher: the students' engine with another stage."""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dha.control_file import ControlConfig, save_control
from dha.frequency import band_mask, dct2, filter_band
from dha.whole_file import write_whole

from ..data.batches import Batch, Corpus
from ..diffusion import training_target
from ..engine.loop import Training
from ..engine.processes import Processes
from ..engine.sheets import Examination, name_bands
from ..engine.stages import Stage
from ..host import Teacher
from ..record import current_command, current_commit, list_versions
from .branch import TrainedBranch
from .settings import ControlSettings

SHEET_SEED = 0  # of the mini band's shuffle in what is validated and shown


def train_control(
    teacher: Teacher,
    corpus: Corpus,
    settings: ControlSettings,
    processes: Processes | None = None,
    held_out: Corpus | None = None,
) -> TrainedBranch:
    """Train a branch and write its file, its settings and its record; the same call goes on where it was stopped.

    Raises what `loop.train_student` raises; in each case the last state is kept.
    """
    processes = processes or Processes(settings.train)
    return ControlTraining(teacher, corpus, settings, processes, held_out).run()


@dataclass(frozen=True)
class ControlStage(Stage):
    """The only stage: the steered teacher learns to find the noise in pictures of which it is shown a band."""

    def weights(self, step: int) -> dict[str, float]:
        return {"noise": 1.0, "band": self.settings.own_band}

    def measure(self, teacher: Teacher, student: TrainedBranch, batch: Batch, checkpointing: bool) -> dict[str, Tensor]:
        """Mean squared error of the prediction, and of its coefficients in the band, with gradients to the branch."""
        name = student.config.band
        band = filter_band(batch.latents, name, seed=batch.seed)
        found = teacher.predict(batch.noisy, batch.t, batch.context, student.as_options(band, checkpointing))
        target = training_target(batch.latents, batch.noise, batch.t, teacher.prediction)
        return {"noise": F.mse_loss(found, target), "band": band_error(found - target, name)}


def band_error(difference: Tensor, band: str) -> Tensor:
    """Mean square of the coefficients (B, 4, h, w) of a difference that a band keeps."""
    return dct2(difference)[..., band_mask(band, *difference.shape[-2:], device=difference.device)].square().mean()


class ControlTraining(Training):
    """A branch with its average and optimizer."""

    def list_stages(self) -> list[Stage]:
        return [ControlStage("control", 0, self.settings.control)]

    def build_student(self) -> TrainedBranch:
        return TrainedBranch(self.teacher, ControlConfig(self.settings.control.band, self.settings.control.rank))

    def make_examination(self, corpus: Corpus, picks: list[int]) -> Examination:
        return ControlExamination(self.teacher, corpus, picks, self.settings.watch, self.processes.size)

    def write_results(self) -> None:
        """The averaged weights, and beside them the settings as TOML and the record as JSON."""
        settings, out, run = self.settings, self.settings.out, self.describe()
        summary = {"pairs": len(self.corpus), "last_losses": self.losses, "validation": self.errors}
        summary |= {"commit": current_commit()}
        save_control(out, self.average.to_file(self.teacher, {"run": run, **summary}))
        write_whole(out.with_suffix(".toml"), settings.to_toml().encode())
        record = {
            "command": current_command("dkd_trainer"),
            **summary,
            "steps": settings.steps,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "bytes": out.stat().st_size,
            "seconds": round(self.seconds, 1),
            "device": str(self.teacher.device),
            "processes": self.processes.count,
            "versions": list_versions(),
            "run": run,
        }
        write_whole(out.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
        self.journal.write("end", step=settings.steps, control=str(out))


class ControlExamination(Examination):
    """Fixed pairs with fixed noise, steered by their own bands."""

    @torch.no_grad()
    def measure_errors(self, student: TrainedBranch) -> dict[str, float]:
        """Squared error of the steered prediction over the unsteered one's, by timesteps, and the means of both.

        `band` is the same ratio in the coefficients of the band alone, over all timesteps.
        """
        means = self.sum_parts(student) / len(self.latents)
        (steered, inside), (unsteered, outside) = means.mean(0).tolist()
        errors = name_bands(means[:, 0, 0] / means[:, 1, 0])
        return {**errors, "band": inside / outside, "steered": steered, "unsteered": unsteered}

    def compare(self, student: TrainedBranch, part: slice, times: list[Tensor]) -> Tensor:
        """Sums (bands, 2, 2) over a part's pictures of mean squared errors, steered and not, of all and of the band."""
        latents, device, name = self.latents[part], self.teacher.device, student.config.band
        steered, sums = student.as_options(filter_band(latents.to(device), name, SHEET_SEED)), []
        for t in times:
            target = training_target(latents, self.noise[part], t[part], self.teacher.prediction).to(device)
            inputs = self.add_noise(part, t)
            off = [self.teacher.predict(*inputs, options) - target for options in (steered, {})]
            sums += [len(latents) * torch.stack([o.square().mean(), band_error(o, name)]) for o in off]
        return torch.stack(sums).view(len(times), 2, 2)

    @torch.no_grad()
    def draw_sheet(self, student: TrainedBranch) -> Tensor:
        """Rows of source, what the band keeps of it, unsteered and steered pictures, as one picture (3, H, W)."""
        parts = self.list_pictures()
        sources = self.latents[: parts[-1].stop].to(self.teacher.device)
        band = filter_band(sources, student.config.band, SHEET_SEED)
        rows = [self.teacher.decode_latents(latents).cpu() for latents in (sources, band)]
        rows += [self.draw(parts, [{} for _ in parts]), self.draw(parts, [student.as_options(band[p]) for p in parts])]
        return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
