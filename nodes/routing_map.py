"""DHA Routing Map: which tokens answer while a picture is drawn, over the picture and over time."""

from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..dha.config import DHAConfig
from ..dha.patch import WATCH
from ..dha.routing import ContextPlan
from ..dha.sites import Site
from .apply import KEY
from .pixels import to_images
from .routing_picture import draw_frame
from .tables import show_report
from .timing import Sampling

LEVELS = {"finest": 0, "second": 1, "third": 2, "coarsest": 3}
PREVIEW = 512


@dataclass
class Step:
    """Shares of the layers that have each token (h, w) as a key, and whose router chose it; the denoised latent."""

    kept: torch.Tensor
    chosen: torch.Tensor
    latent: torch.Tensor


@dataclass
class Recorder:
    """Listens to the patches of a model at one level, for the first picture of the batch and its positive prompt.

    `size` is that of the whole picture in tokens, (height, width); calls for a part of it are only counted.
    """

    level: int
    size: tuple[int, int]
    plans: dict[ContextPlan, None] = field(default_factory=dict)  # in the order of their use
    layers: set[str] = field(default_factory=set)
    partial: int = 0
    calls: list[torch.Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def watch(
        self,
        site: Site,
        plan: ContextPlan,
        grid: torch.Tensor | None,
        chosen: torch.Tensor | None,
        options: dict,
    ) -> None:
        """One attention call; `grid` (coarse,) and `chosen` (B, k) are token numbers, or None where there are none."""
        rows = options.get("cond_or_uncond") or [0]
        if site.level != self.level or 0 not in rows:
            return
        if (plan.height, plan.width) != self.size:
            self.partial += 1
            return
        self.plans[plan] = None
        self.layers.add(site.name)
        found = torch.zeros(2, plan.tokens)  # every key, and those of the router
        if grid is not None:
            found[0, grid.cpu()] = 1
        if chosen is not None:
            found[:, chosen[rows.index(0) * len(chosen) // len(rows)].cpu()] = 1
        self.calls.append(found.view(2, *self.size))

    def close_step(self, denoised: torch.Tensor) -> None:
        """What was heard since the last step becomes one."""
        if self.calls:
            self.steps.append(Step(*torch.stack(self.calls).mean(0), denoised[:1].float().cpu()))
            self.calls.clear()


class RoutingMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHARoutingMap",
            display_name="DHA Routing Map",
            category="DHA/understand",
            description="Draws a picture and shows which tokens answered at each step: on the left the picture as it "
            "was at that step, on the right the same in grey with the tokens that were keys in colour.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="From Apply DHA."),
                io.Vae.Input("vae", tooltip="Decodes the picture below the map at the steps that are shown."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to start from; the first of a batch is shown."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the noise.",
                ),
                io.Int.Input("steps", default=25, min=1, max=10000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale; the map shows the positive prompt's half.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The sampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                    tooltip="The noise schedule.",
                ),
                io.Combo.Input(
                    "level",
                    options=list(LEVELS),
                    default="finest",
                    tooltip="Resolution of the UNet to look at. The map is the mean over its layers: the more of them "
                    "have the token among their keys, the fuller its colour.",
                ),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="How many steps to show, spread evenly from the first to the last; each is decoded.",
                ),
            ],
            outputs=[
                io.Image.Output("frames_out", display_name="frames", tooltip="Picture | map, one for each step shown."),
                io.Image.Output("summary", display_name="summary", tooltip="The last picture | the mean of all steps."),
                io.String.Output("report", display_name="report", tooltip="Counts and overlap of steps as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model, vae, latent_image, level: str, frames: int, **settings) -> io.NodeOutput:
        sampling = Sampling(**settings, denoise=1.0)
        progress = comfy.utils.ProgressBar(sampling.steps + min(frames, sampling.steps) + 1)
        check_student(model)
        recorder = record(model, sampling, latent_image, LEVELS[level], progress)
        check_recorded(recorder, level)
        drawn = []
        for number in spread(len(recorder.steps), frames):
            step = recorder.steps[number]
            picture = decode(vae, model, step.latent)
            title = f"step {number + 1} of {len(recorder.steps)}"
            drawn.append(draw_frame(picture, step.kept, step.chosen, title))
            progress.update_absolute(progress.current + 1, preview=("JPEG", drawn[-1], PREVIEW))
        kept, chosen = (torch.stack([getattr(s, n) for s in recorder.steps]).mean(0) for n in ("kept", "chosen"))
        summary = draw_frame(picture, kept / kept.max().clamp(min=1e-6), chosen, "all steps")
        report = describe(recorder)
        text, shown = show_report(report, summarise(report), tabulate(report))
        images = to_images(drawn)
        return io.NodeOutput(images, to_images([summary]), text, ui=shown | animate(images, cls))


def record(model, sampling: Sampling, latent: dict, level: int, progress) -> Recorder:
    """Sample with a clone that tells what it chooses; the model itself is left as it is."""
    height, width = (-(-side // 2**level) for side in latent["samples"].shape[-2:])  # each level has half, rounded up
    recorder, watched = Recorder(level, (height, width)), model.clone()
    watched.model_options["transformer_options"][WATCH] = recorder.watch

    def advance(step, denoised, noisy, total):
        recorder.close_step(denoised)
        progress.update(1)

    sampling.run(watched, latent, advance)
    return recorder


def check_student(model) -> None:
    """Raises ValueError for a student that chooses tokens where nobody can see it, before anything is sampled."""
    mark = model.model_options["transformer_options"].get(KEY)
    if mark and DHAConfig.from_json(mark).mode == "official":
        raise ValueError(
            "DHA Routing Map found a student of mode 'official', and expected one of mode 'hybrid': published students "
            "choose tokens inside of their own attention, which cannot be shown. Connect another student to Apply DHA, "
            "or none."
        )


def check_recorded(recorder: Recorder, level: str) -> None:
    """Raises ValueError when no layer of the level ran on a short context for the whole picture."""
    if recorder.partial and not recorder.steps:
        raise ValueError(
            "DHA Routing Map found prompts for parts of the picture alone as positive, and expected one for all of it; "
            "connect it from before Conditioning (Set Area), or add one through Conditioning (Combine)."
        )
    if not recorder.steps:
        raise ValueError(
            f"DHA Routing Map found no layer at the level {level!r} that runs a student. Connect the model output of "
            "Apply DHA, with a token_budget between 0 and 1, and choose one of the levels that it speeds up. "
            "With its levels on 'auto' small pictures of the real SD-2.1 stay as they are: set 'two finest' there to "
            "see the map."
        )


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` different numbers from 0 to count - 1, evenly, the last among them."""
    wanted = min(count, wanted)
    return sorted({count - 1 - round((count - 1) * place / max(wanted - 1, 1)) for place in range(wanted)})


def decode(vae, model, latent: torch.Tensor) -> torch.Tensor:
    """A picture (H, W, 3) in 0..1 from a latent as the sampler holds it."""
    return vae.decode(model.model.process_latent_out(latent))[0].float().cpu().clamp(0, 1)


def animate(images: torch.Tensor, cls) -> dict[str, Any]:
    """The frames as a short animation below the node, two a second."""
    settings = {"fps": 2.0, "lossless": False, "quality": 85, "method": 4}
    saved = ui.ImageSaveHelper.save_animated_webp(images, "dha_routing", io.FolderType.temp, cls, **settings)
    return ui.SavedImages([saved], is_animated=len(images) > 1).as_dict()


def describe(recorder: Recorder) -> dict[str, Any]:
    """How many tokens answer, at first and at last, and how much the choice changes from step to step."""
    plans, kept = list(recorder.plans), torch.stack([step.kept for step in recorder.steps])
    pairs = zip(kept[:-1], kept[1:], strict=True)
    overlaps = [(torch.minimum(a, b).sum() / torch.maximum(a, b).sum().clamp(min=1e-6)).item() for a, b in pairs]
    return {
        "tokens": plans[0].tokens,
        "grid": plans[0].coarse,
        "later_grid": plans[-1].coarse,
        "chosen": plans[0].chosen,
        "later_chosen": plans[-1].chosen,
        "layers": len(recorder.layers),
        "steps": len(recorder.steps),
        "ever_answered": (kept.amax(0) > 0).float().mean().item(),
        "overlap_of_steps": sum(overlaps) / len(overlaps) if overlaps else None,
    }


def tabulate(report: dict[str, Any]) -> list[list[str]]:
    rows = [["", "tokens"], ["of the picture at this level", str(report["tokens"])]]
    rows += [
        ["on the grid of each layer", describe_count(report, "grid")],
        ["chosen by each router", describe_count(report, "chosen")],
    ]
    rows.append(["answered in some layer at some step", f"{report['ever_answered']:.0%}"])
    if report["overlap_of_steps"] is not None:
        rows.append(["same as at the step before", f"{report['overlap_of_steps']:.0%}"])
    return rows


def describe_count(report: dict[str, Any], name: str) -> str:
    """A layer's keys of a kind, `grid` or `chosen`: `32`, or `32, later 64`."""
    first, last = report[name], report[f"later_{name}"]
    return str(first) if first == last else f"{first}, later {last}"


def summarise(report: dict[str, Any]) -> str:
    """One line for the node."""
    routed = f" and {describe_count(report, 'chosen')} that its router chose" if report["chosen"] else ""
    answering = f"in each of {report['layers']} layers {describe_count(report, 'grid')} tokens of a grid{routed} answer"
    return f"{answering}, of {report['tokens']}; over the steps {report['ever_answered']:.0%} had their turn"
