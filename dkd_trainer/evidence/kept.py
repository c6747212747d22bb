"""Results that outlive a stopped run: one file for everything that decides them, whole or not there."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dha.whole_file import write_whole

from ..host import ROOT
from .hardware import read_comfyui_version

EVIDENCE = ("contexts", "evaluation", "held_out", "judges", "peers", "students", "subject")
METRICS = ("bands", "captions", "features", "phrases", "prompt_score", "published")
# What decides a measurement, beside all of dha; presenting it and training do not.
SOURCES = (
    "dkd_trainer/diffusion.py",
    "dkd_trainer/engine/attention.py",
    "dkd_trainer/engine/imitation.py",  # a student's options
    "dkd_trainer/host.py",
    *(f"dkd_trainer/evidence/{name}.py" for name in EVIDENCE),
    *(f"dkd_trainer/metrics/{name}.py" for name in METRICS),
)


def list_folder(folder: str) -> list[str]:
    """The sources of a package of ours, by their paths in the pack."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py"))


def name_code(more: Sequence[str] = ()) -> str:
    """A short hash of the sources that decide a measurement, `more` of them perhaps, and of torch and ComfyUI."""
    return name_sources([*list_folder("dha"), *SOURCES, *more])


def name_training() -> str:
    """A short hash of the sources that decide what a training makes of its settings, and of torch and ComfyUI."""
    return name_sources([*list_folder("dha"), *list_folder("dkd_trainer/engine"), "dkd_trainer/diffusion.py"])


def name_sources(names: Sequence[str]) -> str:
    """A short hash of the sources of these paths in the pack, and of torch and ComfyUI."""
    digest = hashlib.sha256(f"{torch.__version__} {read_comfyui_version()}".encode())
    for name in names:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def name_file(path: Path) -> str:
    """A short hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:16]


class Kept:
    """A folder of results; `common` is what decides all of them."""

    def __init__(self, folder: Path, common: dict):
        self.folder, self.common = folder, common

    def locate(self, identity: dict) -> Path:
        """The file of one result."""
        text = json.dumps([self.common, identity], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    def get_tensors(self, identity: dict, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result that was kept, or else a new one, which is kept; a damaged file is measured again."""
        path = self.locate(identity)
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):
            measured = {name: tensor.contiguous() for name, tensor in measure().items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(measured, {"identity": json.dumps(identity)}))
            return measured
