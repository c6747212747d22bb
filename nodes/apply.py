"""Apply DHA: patches a model's self-attention through the ModelPatcher and leaves no trace on the model itself."""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..dha.checkpoint import check_architecture
from ..dha.patch import Patches, make_patches
from ..dha.planner import Pays, Planner
from ..dha.presets import NO_CAP, PRESETS, Preset, Stretch
from ..dha.sites import read_architecture
from ..dha.student import FREE_CONFIG, Student
from .kernel import attend, attend_short
from .load import DHA_STUDENT, LoadedStudent
from .measured import describe_presets, read_measured
from .payoff import find_payoff, stamp_file

KEY = "dha"  # under which our mark, our wrapper and our weights are kept in a model patcher
PATCHES = "dha_patches"  # key in transformer_options of a student's `Patches`, for a control's branch to run with too
CUSTOM, NEW = "custom", "balanced"  # a preset's place where token_budget says it, and what a new node stands on
RANGES = {"finest": (0,), "two finest": (0, 1), "three finest": (0, 1, 2), "all": (0, 1, 2, 3)}
LEVELS: dict[str, tuple[int, ...] | None] = {"auto": None, **RANGES}


class ApplyDHA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ApplyDHA",
            display_name="Apply DHA",
            category="DHA",
            description=(
                "Makes a Stable Diffusion 2.x model faster: in self-attention each token looks at a short list of "
                "tokens instead of at all of them, and a few that look at all tell the others what they miss; a small "
                "student file, distilled from your checkpoint, makes up for more of the rest. Works with LoRA, "
                "ControlNet, HyperTile and ToMe before or after it."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 2.0 or 2.1 model, fine-tunes and LoRAs included."),
                io.Combo.Input(
                    "levels",
                    options=list(LEVELS),
                    default="auto",
                    tooltip="Resolutions of the UNet to speed up. auto: those of the student (without one, the two "
                    "finest) where it makes this picture size faster on this device; of an imported student, all of "
                    "them. Nearly all of the cost is at the finest.",
                ),
                io.Float.Input(
                    "token_budget",
                    default=0.125,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="With the preset custom: the share of the tokens that each token looks at. Lower is faster "
                    "and less exact. 0 is the untouched model.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="When in the sampling to start, 0 at the first step. Raise it to keep the first steps, "
                    "which decide the composition, exact.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="When in the sampling to stop, 1 at the last step. Lower it to keep the last steps, which "
                    "draw the detail, exact: they gain most. The presets stop by themselves.",
                ),
                DHA_STUDENT.Input(
                    "student",
                    optional=True,
                    tooltip="From Load DHA Student. Without it the model is sped up untrained: less exactly with fast "
                    "and balanced, nearly as exactly with quality.",
                ),
                # Optional: a graph in API format that names a token_budget and no preset gets its budget.
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=NEW,
                    optional=True,
                    tooltip=f"How much exactness to give for speed. {CUSTOM}: what token_budget says.\n"
                    + describe_presets(read_measured()),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, sped up; the one that came in stays as it is.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return stamp_file()  # what was measured on this machine counts from the next run on

    @classmethod
    def execute(
        cls, model, levels, token_budget, start_percent, end_percent, student=None, preset=CUSTOM
    ) -> io.NodeOutput:
        spending = PRESETS.get(preset, Preset((Stretch(token_budget, NO_CAP),)))
        if (preset not in PRESETS and token_budget == 0) or start_percent >= end_percent:
            return io.NodeOutput(model)
        return io.NodeOutput(apply_student(model, student, LEVELS[levels], spending, start_percent, end_percent))


def apply_student(model, loaded: LoadedStudent | None, levels, spending: Preset, start: float, end: float):
    """A clone of the model that runs the student; raises ArchitectureError, StudentFileError or ValueError.

    `levels` None are the student's own, of mode `hybrid` each where it pays on this device. The preset's stretches
    count between `start` and `end`, but for students of mode `official`, whose norms cannot change while it samples.
    """
    architecture = read_architecture(model.model.diffusion_model.state_dict())
    if KEY in model.model_options["transformer_options"]:
        raise ValueError(
            "this model already went through Apply DHA; connect the model from before it, or remove one of the two"
        )
    if loaded is None:
        student = Student(FREE_CONFIG if levels is None else replace(FREE_CONFIG, levels=levels), architecture)
    else:
        student = loaded.patcher.model
        check_architecture(loaded.name, student.architecture, architecture)
        check_levels(loaded.name, student, levels)
        warn_prediction("Apply DHA", loaded.name, loaded.metadata.get("prediction", ""), model)
    chosen = student.config.levels if levels is None else levels
    taken = find_replaced(model) & {site.block for site in student.list_sites() if site.level in chosen}
    if taken:
        logging.warning("Apply DHA: another node owns the self-attention of %s; these stay as they are.", sorted(taken))
    patched, is_hybrid = model.clone(), student.config.mode == "hybrid"
    if is_hybrid and start >= spending.end:
        logging.warning(
            "Apply DHA: start_percent %g does not come before the preset's own end, %g, so nothing changes. Lower it, "
            "or choose custom, which has no end.",
            start,
            spending.end,
        )
        return model
    ends = [min(end, stretch.end) for stretch in spending.stretches] if is_hybrid else [end]
    # With nothing to decide nothing is asked: norms that hold for the whole sampling allow no window.
    is_windowed = [start, *ends] != [0.0, 1.0]
    asked = {"find_stretch": ask_ahead(patched, make_clock(model, start, ends), KEY)} if is_windowed else {}
    pays = find_payoff(model).pays if levels is None else None
    asked |= {"skip": frozenset(taken), "pays": pays, "attend_short": attend_short}
    patches = make_patches(student, attend, spending.stretches, levels, **asked)
    install(patched, patches)
    if pays is not None and is_hybrid:
        say = say_if_nothing_pays(student, spending.stretches[0], pays)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, say)
    attributes = student.list_attributes(patches.blocks)
    set_attributes(patched, attributes, is_windowed)
    patched.model_options["transformer_options"][KEY] = student.config.to_json()
    if not attributes:  # what needs other norms than the model has cannot run in a branch that has the model's
        patched.model_options["transformer_options"][PATCHES] = patches
    if loaded is not None:
        patched.set_additional_models(KEY, [loaded.patcher])
    return patched


def install(patched, patches: Patches) -> None:
    """Put a student's callables into a model patcher."""
    for name, (patch,) in patches.as_options()["patches"].items():
        patched.set_model_patch(patch, name)
    for kind, number in patches.blocks:
        patched.set_model_attn1_replace(patches.replace, kind, number)


def set_attributes(patched, attributes: dict[str, int], windowed: bool) -> None:
    """Values that hold for the whole sampling; raises ValueError for a student that needs some within a window."""
    if attributes and windowed:
        raise ValueError(
            "this student was trained with other norms than the model has, which cannot change while it samples; set "
            "start_percent to 0 and end_percent to 1"
        )
    for path, value in attributes.items():
        patched.add_object_patch(f"diffusion_model.{path}", value)


def make_clock(model, start: float, ends: Sequence[float]) -> Callable[[dict], int | None]:
    """A question to the running step: which of the stretches until `ends`, percents of the sampling, is it in?

    None before `start` and behind the last end. The noise level is fetched from the device once a step, however many
    forwards the step takes.
    """
    sampling = model.get_model_object("model_sampling")
    highest, *lowest = (float(sampling.percent_to_sigma(percent)) for percent in (start, *ends))
    asked, answer = None, None

    def find_stretch(options: dict) -> int | None:
        nonlocal asked, answer
        sigmas = options["sigmas"]
        if asked is None or asked() is not sigmas:
            level = sigmas[0].item()
            later = (number for number, least in enumerate(lowest) if level >= least)
            asked, answer = weakref.ref(sigmas), next(later, None) if level <= highest else None
        return answer

    return find_stretch


def ask_ahead(patched, question: Callable[[dict], int | None], key: str) -> Callable[[dict], int | None]:
    """The same question, put before the UNet is entered: reading a number inside would break a compiled graph.

    `key` is that of who asks: the answer travels in transformer_options under its own name.
    """
    place = f"{key}_stretch"

    def note(executor, x, t, concat, text, control, options, **kwargs):
        options[place] = question(options)
        return executor(x, t, concat, text, control, options, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, note)
    return lambda options: options.get(place, 0)


def say_if_nothing_pays(student: Student, stretch: Stretch, pays: Pays) -> Callable:
    """A wrapper of whole samplings: a user whose picture is too small for a gain is told, and what to do about it."""
    wanted, paying = Planner(student, stretch), Planner(student, stretch, pays)
    channels = {site.level: student.architecture.channels[site.name] for site in student.list_sites()}

    def say(executor, noise, *args, **kwargs):
        height, width = noise.shape[-2:]
        layers = [(-(-height >> level), -(-width >> level), width_of) for level, width_of in channels.items()]
        shortened, faster = (any(planner.plan(*layer) for layer in layers) for planner in (wanted, paying))
        if shortened and not faster:
            logging.info(
                "Apply DHA: at %dx%d no layer is known to get faster on this device, so nothing changes. Draw a larger "
                "picture, let DHA Measure Layers find out for this size, or set levels to 'two finest' to try.",
                8 * width,
                8 * height,
            )
        return executor(noise, *args, **kwargs)

    return say


def find_replaced(model) -> set[tuple[str, int]]:
    """Blocks whose self-attention another node has already replaced."""
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    return {tuple(block[:2]) for block in replaced}


def check_levels(name: str, student: Student, levels: tuple[int, ...] | None) -> None:
    """Raise ValueError when none of the asked levels was trained."""
    if levels is not None and not set(levels) & set(student.config.levels):
        raise ValueError(
            f"{name} was trained for levels {student.config.levels} (0 is the finest), not for {levels}; use auto"
        )


def warn_prediction(node: str, name: str, made: str, model) -> None:
    """Say it when a file made for a noise-predicting model (`eps`) meets a v-predicting one (`v`) or the other way."""
    found = model.model.model_type.name
    expected = {"eps": "EPS", "v": "V_PREDICTION"}.get(made)
    if expected and found != expected:
        logging.warning("%s: %s was trained on %s prediction, this model uses %s.", node, name, made, found)
