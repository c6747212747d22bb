"""The student file: what is written comes back, wrong tensors are named, a failed save leaves the old file."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from student_files import CONFIG, FULL, NAME, NARROW, OFFICIAL, build, refuse, rewrite

from dha.checkpoint import StudentFileError, check_architecture, load_student, read_metadata, save_student
from dha.config import DHAConfig


@pytest.fixture
def path(tmp_path):
    """A right file."""
    path = tmp_path / "student.safetensors"
    save_student(path, build(), teacher="0123456789abcdef", prediction="v", training={"steps": 7})
    return path


@pytest.mark.parametrize(
    "config", [CONFIG, DHAConfig(), OFFICIAL, DHAConfig(levels=(3, 0), rank=1, deltas=("v",))], ids=str
)
def test_round_trip(tmp_path, config):
    path, student = tmp_path / "new" / "folder" / "a.safetensors", build(config)
    save_student(path, student, teacher="abc", training={"steps": 7})
    loaded = load_student(path)
    assert loaded.config == config and loaded.architecture == NARROW
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    expected = student.named_weights()
    assert loaded.named_weights().keys() == expected.keys()
    for name, tensor in loaded.named_weights().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name].half().float()), name
    assert not any(p.is_meta for p in loaded.parameters())


def test_metadata(path):
    metadata = read_metadata(path)
    assert metadata["format"] == "dha-student" and metadata["version"] == "1"
    assert metadata["prediction"] == "v" and metadata["teacher"] == "0123456789abcdef"
    assert json.loads(metadata["training"]) == {"steps": 7}
    assert metadata["modelspec.title"] == "student"
    assert NAME in load_file(path)


def test_half_precision(path):
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    assert {p.dtype for p in load_student(path, dtype=torch.float16).parameters()} == {torch.float16}


def test_missing_tensor(path):
    rewrite(path, lambda _, weights: weights.pop(NAME))
    refuse(path, "1 tensors missing", NAME, "0 surplus")


def test_surplus_tensor(path):
    rewrite(path, lambda _, weights: weights.update({"y" * 100_000: torch.zeros(1)}))
    refuse(path, "0 tensors missing", "1 surplus", "yyy")


def test_no_tensors(path):
    rewrite(path, lambda _, weights: weights.clear())
    refuse(path, "missing")


@pytest.mark.parametrize("shape", [(4, 32), (3, 31), (96,), (), (3, 32, 1), (0, 32)], ids=str)
def test_wrong_shape(path, shape):
    rewrite(path, lambda _, weights: weights.update({NAME: torch.zeros(shape)}))
    refuse(path, NAME, str(shape), "expected (3, 32)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_not_finite(path, value):
    """1e30 is finite in the file, but not in the half precision that a GPU loads it in."""

    def spoil(_, weights):
        weights[NAME] = weights[NAME].float()
        weights[NAME][1, 5] = value

    rewrite(path, spoil)
    refuse(path, NAME, "not finite")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_not_floating_point(path, dtype):
    rewrite(path, lambda _, weights: weights.update({NAME: torch.zeros(3, 32, dtype=dtype)}))
    refuse(path, NAME, str(dtype), "floating-point")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_other_precisions_are_read(path, dtype):
    rewrite(path, lambda _, weights: weights.update({n: t.to(dtype) for n, t in weights.items()}))
    assert torch.equal(load_student(path).named_weights()[NAME], load_file(path)[NAME].float())


def test_published_heads(tmp_path):
    """Published students bring projections with heads 64 wide; a layer of 32 has none."""
    path = tmp_path / "official.safetensors"
    save_student(path, build(OFFICIAL), teacher="")
    config = json.dumps({**json.loads(OFFICIAL.to_json()), "levels": [0]})
    rewrite(path, lambda metadata, _: metadata.update(config=config))
    refuse(path, "32 wide", "head width 64")


def test_other_architecture():
    check_architecture("a.safetensors", NARROW, NARROW)
    with pytest.raises(
        StudentFileError, match="a.safetensors was trained for sd2-unet-32-96.*sd2-unet-320-1024.*load a student"
    ):
        check_architecture("a.safetensors", NARROW, FULL)


def list_folder(path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


@pytest.mark.parametrize("place", ["write_bytes", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"]
)
def test_failed_save_leaves_the_old_file(path, monkeypatch, place, error):
    before = path.read_bytes()

    def fail(*arguments):
        if place == "write_bytes":
            arguments[0].write_text("half of a file")
        assert len(list_folder(path)) == 2, "this would not notice a file left behind"
        raise error

    monkeypatch.setattr(Path if place == "write_bytes" else os, place, fail)
    with pytest.raises(type(error)):
        save_student(path, build(), teacher="new")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list_folder(path) == [path.name]


def test_save_refuses_what_is_not_finite(path):
    before, student = path.read_bytes(), build()
    with torch.no_grad():
        student.sites["output_9"].memory.tokens[0, 0] = 1e6  # finite in fp32, infinite in the file
    with pytest.raises(StudentFileError, match="memory.tokens.*not finite in fp16; the student was not saved"):
        save_student(path, student, teacher="new")
    assert path.read_bytes() == before and list_folder(path) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_saved_file_has_ordinary_permissions(path):
    ordinary = path.with_name("ordinary")
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
