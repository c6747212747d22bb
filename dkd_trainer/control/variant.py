"""A way to draw held-out pictures, the teacher or a student, steered or not, and what is measured of its pictures."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dha.peak import watch_peak
from dha.student import Student

from ..engine.imitation import student_options
from ..evidence.evaluation import Sampling, decode_pictures, draw_latents, judge_pictures
from ..evidence.held_out import HeldOut
from ..evidence.students import fit_student
from ..evidence.subject import Running, Subject
from ..host import Teacher
from ..metrics.bands import band_fidelity
from ..metrics.structure import structure_distance
from .steering import FrozenBranch, join_options
from .tasks import Task

SEED = 11  # of the noise that pictures are drawn from; each batch has its own


@dataclass(frozen=True)
class Variant:
    """A model to draw with; `identity` says what decides its pictures beside the name and the teacher.

    With `inside` a student runs in the control branch as well.
    """

    name: str
    student: Student | None = None
    branch: FrozenBranch | None = None
    strength: float = 0.0
    identity: str = ""
    inside: bool = False

    @property
    def key(self) -> dict[str, object]:
        return {"name": self.name, "strength": self.strength, "identity": self.identity, "inside": self.inside}

    def on(self, sources: Tensor | None = None, seed: int = SEED) -> Subject:
        """The subject that draws after sources (B, 4, h, w), or to be timed after noise."""

        def build(teacher: Teacher, side: int) -> dict:
            own = student_options(fit_student(self.student, teacher)) if self.student else {}
            if self.branch is None:
                return own
            given = torch.randn(1, 4, side, side) if sources is None else sources
            inner = own if self.inside else None
            return join_options(own, self.branch.as_options(teacher, given, self.strength, inner=inner))

        sites = [site.block for site in self.student.list_sites()] if self.student else []
        attributes = self.student.list_attributes(sites) if self.student else {}
        return Subject(self.name, "", build, seed=seed, attributes=attributes)


def draw_variant(teacher: Teacher, variant: Variant, scenes: HeldOut, sampling: Sampling) -> Tensor:
    """Latents (n, 4, h, w) of all prompts, each steered by the latents of its own number."""
    drawn = []
    for start in range(0, len(scenes), sampling.batch):
        part = slice(start, start + sampling.batch)
        chunk = replace(
            scenes, latents=scenes.latents[part], context=scenes.context[part], prompts=scenes.prompts[part]
        )
        running = Running(teacher, variant.on(chunk.latents, SEED + start), chunk.latents.shape[-1], sampling.precision)
        drawn.append(draw_latents(teacher, running, chunk, sampling))
    return torch.cat(drawn)


def measure_variant(
    teacher: Teacher,
    variant: Variant,
    scenes: HeldOut,
    task: Task,
    sampling: Sampling,
    judges: dict,
    net: nn.Module,
    reference: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """All that is measured of a variant, first dimension n; `reference` is what its teacher draws, None for itself."""
    latents = draw_variant(teacher, variant, scenes, sampling)
    pictures = decode_pictures(teacher, latents)
    found = judge_pictures(pictures, latents, task.captions, judges, reference)
    if "aspects" in found:
        found |= score_task(found.pop("aspects"), task)
    found["fidelity"] = band_fidelity(latents, scenes.latents)
    pairs = zip(pictures.split(32), scenes.pictures.split(32), strict=True)
    found["structure"] = torch.cat([structure_distance(net, a.float() / 255, b.float() / 255) for a, b in pairs])
    return found | {"pictures": pictures, "latents": latents}


def score_task(aspects: Tensor, task: Task) -> dict[str, Tensor]:
    """Prompt score (n,) from probabilities (n, 4) by aspect, and its parts: what was changed, and what was not."""
    asked, kept = task.split_aspects()
    scores = {"prompt_score": aspects.nanmean(1)}
    return scores | ({"asked": aspects[:, asked].nanmean(1), "kept": aspects[:, kept].nanmean(1)} if asked else {})


@torch.inference_mode()
def measure_memory(
    teacher: Teacher, variants: list[Variant], size: int, batch: int, precision: str = "fp32"
) -> dict[str, dict[str, int]]:
    """Bytes of each variant's own weights, and at the peak of one UNet call beyond all weights; `size` in pixels."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, size // 8, size // 8, generator=generator).to(teacher.device)
    context = torch.randn(batch, 77, teacher.architecture.context, generator=generator).to(teacher.device)
    t, found = torch.full((batch,), 500, device=teacher.device), {}
    for variant in variants:
        running = Running(teacher, variant.on(), size // 8, precision)
        with watch_peak(teacher.device) as peak:
            running.predict(latents, t, context)
        modules = [module for module in (variant.student, variant.branch and variant.branch.fit(teacher)) if module]
        weights = sum(weight.nbytes for module in modules for weight in module.parameters())
        found[variant.name] = {"peak_bytes": peak.bytes, "weight_bytes": weights}
    return found


def is_uncontrolled(teacher: Teacher, branch: FrozenBranch, sources: Tensor, context: Tensor) -> bool:
    """Whether strength 0 predicts what the teacher alone predicts, to the bit."""
    t = torch.full((len(sources),), 500, device=teacher.device)
    inputs = (sources.to(teacher.device), t, context.to(teacher.device))
    with torch.inference_mode():
        return torch.equal(teacher.predict(*inputs), teacher.predict(*inputs, branch.as_options(teacher, sources, 0.0)))
