"""Load and Apply Frequency Control: FCDiffusion's image to image, through the ModelPatcher alone."""

from pathlib import Path

import folder_paths
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import io

from ..dha.control import make_decoder_patch, make_wrapper
from ..dha.control_file import load_control
from ..dha.sites import read_architecture
from .apply import ask_ahead, make_clock, warn_prediction
from .control_branch import Hint, LoadedControl, make_steering
from .model_folders import CONTROLS

FREQUENCY_CONTROL = io.Custom("DHA_FREQUENCY_CONTROL")
KEY = "dha_control"  # under which a control's parts are kept in a model patcher; a second control's have a number


class LoadFrequencyControl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DHALoadFrequencyControl",
            display_name="Load Frequency Control",
            category="DHA",
            description="Loads a frequency control from models/dha_control for Apply Frequency Control.",
            inputs=[
                io.Combo.Input(
                    "control_name",
                    options=folder_paths.get_filename_list(CONTROLS),
                    tooltip="A file in ComfyUI's models/dha_control folder. Each is trained for one band: mini creates "
                    "in the style of the source, low changes what it shows, mid translates its scene, high its style.",
                )
            ],
            outputs=[FREQUENCY_CONTROL.Output(display_name="control", tooltip="For Apply Frequency Control.")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_name):
        stat = Path(folder_paths.get_full_path_or_raise(CONTROLS, control_name)).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, control_name) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise(CONTROLS, control_name))
        return io.NodeOutput(LoadedControl(control_name, load_control(path)))


class ApplyFrequencyControl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DHAApplyFrequencyControl",
            display_name="Apply Frequency Control",
            category="DHA",
            description=(
                "Lets a band of a source picture's frequencies steer a Stable Diffusion 2.x model, while the prompt "
                "says what to draw. Works with DHA, LoRA, ControlNet and masks before or after it; several add up."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 2.0 or 2.1 model, with or without DHA."),
                FREQUENCY_CONTROL.Input("control", tooltip="From Load Frequency Control."),
                io.Latent.Input(
                    "source",
                    tooltip="The source picture from VAE Encode, at the size of the new picture; others are scaled and "
                    "cut to it. Of a batch, each source steers the picture of its number.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How strongly the source steers. 0 is the uncontrolled model.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="When in the sampling to start, 0 at the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="When in the sampling to stop, 1 at the last step.",
                ),
                io.Int.Input(
                    "shuffle_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="The mini band's coefficients are shuffled by this seed; other bands do not use it.",
                ),
                # Last and optional: graphs from before it was there keep their values.
                io.Boolean.Input(
                    "accelerate",
                    default=False,
                    optional=True,
                    tooltip="Run the control's own layers with the model's DHA too: faster at large sizes, a little "
                    "less exact. It costs least exactness with a student trained with controls. It has no effect "
                    "without Apply DHA or with imported students.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered; the one that came in stays as it is.")],
        )

    @classmethod
    def execute(
        cls, model, control, source, strength, start_percent, end_percent, shuffle_seed, accelerate=False
    ) -> io.NodeOutput:
        if strength == 0 or start_percent >= end_percent:
            return io.NodeOutput(model)
        read_architecture(model.model.diffusion_model.state_dict())  # ahead of all that other families have otherwise
        clock = None if (start_percent, end_percent) == (0.0, 1.0) else make_clock(model, start_percent, [end_percent])
        hint = make_hint(model, control, source["samples"], shuffle_seed)
        return io.NodeOutput(apply_control(model, control, hint, strength, clock, accelerate))


def make_hint(model, loaded: LoadedControl, latents, seed: int) -> Hint:
    """The source as the model sees latents; raises ValueError when it is no batch of SD latents."""
    if latents.ndim != 4 or latents.shape[1] != 4:
        raise ValueError(
            f"the source is {tuple(latents.shape)}, expected latents (batch, 4, height, width); connect VAE "
            "Encode with the model's own VAE"
        )
    return Hint(model.model.process_latent_in(latents), loaded.file.config.band, seed)


def apply_control(model, loaded: LoadedControl, hint: Hint, strength: float, clock, accelerate: bool = False):
    """A clone of the model that a control steers; raises ArchitectureError or ControlFileError.

    `clock(options)`, asked once per forward, switches it off where it is None; without one it is always on. With
    `accelerate` the model's DHA runs in the branch as well, whether it was applied before or comes after.
    """
    branch = loaded.build_for(model)
    warn_prediction("Apply Frequency Control", loaded.name, loaded.file.prediction, model)
    patched = model.clone()
    key = choose_key(patched)
    asked = None if clock is None else ask_ahead(patched, clock, key)
    wrapper = make_wrapper(make_steering(branch.model, hint, strength, asked, accelerate), key)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    patched.set_model_output_block_patch(make_decoder_patch(key))
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, hint.forget)
    patched.set_additional_models(key, [branch])
    return patched


def choose_key(model) -> str:
    """A key that no control of this model has yet."""
    taken = sum(name.startswith(KEY) for name in model.additional_models)
    return f"{KEY}_{taken}" if taken else KEY
