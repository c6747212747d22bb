"""Load DHA Student: a file from models/dha becomes weights that ComfyUI counts, moves and frees."""

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from comfy_api.latest import io

from ..dha.checkpoint import load_student, read_metadata
from .model_folders import STUDENTS

DHA_STUDENT = io.Custom("DHA_STUDENT")


@dataclass(frozen=True)
class LoadedStudent:
    """A student's file name, its description, and its weights in the hands of ComfyUI's memory management."""

    name: str
    metadata: dict[str, str]
    patcher: comfy.model_patcher.ModelPatcher


class LoadDHAStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadDHAStudent",
            display_name="Load DHA Student",
            category="DHA",
            description="Loads a Dynamic Hybrid Attention student from models/dha for Apply DHA.",
            inputs=[
                io.Combo.Input(
                    "student_name",
                    options=folder_paths.get_filename_list(STUDENTS),
                    tooltip="A student file in ComfyUI's models/dha folder. It fits checkpoints of the architecture "
                    "that it was trained for.",
                )
            ],
            outputs=[DHA_STUDENT.Output(display_name="student", tooltip="The student, for Apply DHA.")],
        )

    @classmethod
    def fingerprint_inputs(cls, student_name):
        stat = Path(folder_paths.get_full_path_or_raise(STUDENTS, student_name)).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, student_name) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise(STUDENTS, student_name))
        return io.NodeOutput(load_into_host(path, student_name))


def load_into_host(path: Path, name: str) -> LoadedStudent:
    """Read a student file into ComfyUI's casting layers; raises StudentFileError for a wrong file."""
    device = comfy.model_management.get_torch_device()
    half = comfy.model_management.should_use_fp16(device)
    student = load_student(path, comfy.ops.manual_cast, dtype=torch.float16 if half else torch.float32)
    patcher = comfy.model_patcher.ModelPatcher(student, device, comfy.model_management.unet_offload_device())
    return LoadedStudent(name, read_metadata(path), patcher)
