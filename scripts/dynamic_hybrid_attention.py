"""The WebUI of AUTOMATIC1111 and Forge: a clone of this repository in their folder `extensions` is an extension."""

import json
from pathlib import Path

import gradio as gr
import torch
from modules import devices, scripts
from modules.paths import models_path

from dha.attach import attach
from dha.checkpoint import StudentFileError, check_architecture, load_student
from dha.payoff import choose_payoff
from dha.presets import PRESETS
from dha.sites import ArchitectureError, read_architecture
from dha.student import FREE_CONFIG, Student

TRAINING_FREE = "none, training-free"
STUDENTS = Path(models_path) / "dha"
MEASURED = Path(__file__).resolve().parent.parent / "nodes" / "measured.json"


class DynamicHybridAttention(scripts.Script):
    """Puts the chosen student into the UNet before each batch and takes it off afterwards."""

    attached: list = []  # of the class: what a picture that failed in one tab has left is taken off by the other

    def title(self):
        return "Dynamic Hybrid Attention"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion(self.title(), open=False):
            enabled = gr.Checkbox(False, label="Make Stable Diffusion 2.x faster")
            preset = gr.Dropdown(list(PRESETS), value="balanced", label="Preset: exactness for speed")
            student = gr.Dropdown([TRAINING_FREE, *list_students()], value=TRAINING_FREE, label="Student in models/dha")
        return [enabled, preset, student]

    def process(self, p, *_):
        self.take_off()

    def process_batch(self, p, enabled, preset, student, **_):
        self.take_off()
        if not enabled:
            return
        try:
            unet = find_unet(p.sd_model)
            self.attached.append(attach(unet, choose_student(unet, student), PRESETS[preset], find_payoff().pays))
            p.extra_generation_params["Dynamic Hybrid Attention"] = f"{preset}, {student}"
        except (ArchitectureError, StudentFileError) as error:
            p.comment(f"Dynamic Hybrid Attention stays out: {error}")

    def postprocess_batch(self, p, *_, **__):
        self.take_off()

    def take_off(self):
        """Leave every UNet as it was before."""
        while self.attached:
            self.attached.pop()()


def find_unet(model):
    """The UNet's modules: Forge keeps a patcher beside them, AUTOMATIC1111's WebUI the model of the published code."""
    forge = getattr(model, "forge_objects", None)
    return (forge.unet if forge else model).model.diffusion_model


def list_students():
    return sorted(path.name for path in STUDENTS.glob("*.safetensors"))


def choose_student(unet, name):
    """The named student, or one without trained parts; raises ArchitectureError or StudentFileError."""
    architecture = read_architecture(unet.state_dict())
    if name == TRAINING_FREE:
        return Student(FREE_CONFIG, architecture)
    student = load_student(STUDENTS / name)
    check_architecture(name, student.architecture, architecture)
    return student


def find_payoff():
    """Which layers get faster here, as ComfyUI's nodes have it; small pictures stay as they are."""
    layers = json.loads(MEASURED.read_text(encoding="utf-8"))["layers"]
    return choose_payoff(layers, devices.device.type, "fp32" if devices.dtype == torch.float32 else "fp16")
