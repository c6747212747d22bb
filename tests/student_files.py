"""Student files as tests write them, change them and find them refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dha.checkpoint import StudentFileError, load_student
from dha.config import DHAConfig
from dha.sites import SITES, Architecture
from dha.student import Student

CONFIG = DHAConfig(levels=(0, 1), memory=3, rank=2, router_width=8)
WIDTHS = (32, 64, 128, 128)
NARROW = Architecture({site.name: WIDTHS[site.level] for site in SITES}, embedding=128, context=96)
FULL = Architecture({site.name: 320 * (1, 2, 4, 4)[site.level] for site in SITES}, embedding=1280, context=1024)
OFFICIAL = DHAConfig(mode="official", levels=(1,))
NAME = "output_blocks.9.1.transformer_blocks.0.attn1.memory.tokens"


def build(config: DHAConfig = CONFIG, architecture: Architecture = NARROW) -> Student:
    torch.manual_seed(0)
    student = Student(config, architecture)
    for tensor in student.parameters():
        torch.nn.init.normal_(tensor)
    return student


def rewrite(path, edit) -> None:
    """Change a file's metadata and tensors: `edit(metadata, weights)`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    edit(metadata, weights)
    save_file(weights, path, metadata=metadata or None)


def refuse(path, *words: str) -> None:
    """Loading raises one StudentFileError of a readable length that names the file and says these words."""
    with pytest.raises(StudentFileError) as caught:
        load_student(path)
    message = str(caught.value)
    assert path.name in message and len(message) < 700, message
    for word in words:
        assert word in message, message
