"""The student file: what is written comes back, and every wrong file gives one error that helps."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dha.checkpoint import StudentFileError, check_architecture, load_student, read_metadata, save_student
from dha.config import DHAConfig
from dha.sites import SITES, Architecture
from dha.student import Student

CONFIG = DHAConfig(levels=(0, 1), memory=3, rank=2, router_width=8)
WIDTHS = (32, 64, 128, 128)
NARROW = Architecture({site.name: WIDTHS[site.level] for site in SITES}, embedding=128, context=96)
FULL = Architecture({site.name: 320 * (1, 2, 4, 4)[site.level] for site in SITES}, embedding=1280, context=1024)
DEEP = "[" * 100_000
OFFICIAL = DHAConfig(mode="official", levels=(1,))
NAME = "output_blocks.9.1.transformer_blocks.0.attn1.memory.tokens"


def build(config: DHAConfig = CONFIG, architecture: Architecture = NARROW) -> Student:
    torch.manual_seed(0)
    student = Student(config, architecture)
    for tensor in student.parameters():
        torch.nn.init.normal_(tensor)
    return student


@pytest.fixture
def path(tmp_path):
    """A right file."""
    path = tmp_path / "student.safetensors"
    save_student(path, build(), teacher="0123456789abcdef", prediction="v", training={"steps": 7})
    return path


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


@pytest.mark.parametrize("size", [0, 4, 8, 100, 2000, -1])
def test_truncated(path, size):
    path.write_bytes(path.read_bytes()[:size])
    refuse(path, "not a whole safetensors file", "download it again")


def test_not_safetensors(path):
    torch.save({"a": torch.zeros(3)}, path)
    refuse(path, "another kind of file")
    path.write_bytes(pickle.dumps({"format": "dha-student"}))
    refuse(path, "another kind of file")
    path.write_bytes(b"\xff" * 4096)
    refuse(path, "another kind of file")
    path.write_bytes((100).to_bytes(8, "little") + DEEP.encode())
    refuse(path, "another kind of file")
    path.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    refuse(path, "another kind of file")


def test_pickles_are_not_run(path, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path.write_bytes(pickle.dumps(Trap()))
    refuse(path, "not a whole safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_no_file(tmp_path):
    refuse(tmp_path / "absent.safetensors", "does not exist", "models/dha")
    (tmp_path / "folder.safetensors").mkdir()
    refuse(tmp_path / "folder.safetensors", "is a folder")


def test_other_kinds_of_models(path):
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(4, 4)}, path)
    refuse(path, "not a DHA student", "LoRA")
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    refuse(path, "not a DHA student", "'pt'")
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "x" * 10**6})
    refuse(path, "not a DHA student")


@pytest.mark.parametrize("version", ["2", "999999999", str(10**30), "²", "1.0", "-1", "0", "", "one", "1" * 5000, "٣"])
def test_versions(path, version):
    rewrite(path, lambda metadata, _: metadata.update(version=version))
    refuse(path, "version", "update the pack" if version in ("2", "999999999", "0") else "expected a number")


def test_no_version(path):
    rewrite(path, lambda metadata, _: metadata.pop("version"))
    refuse(path, "version")


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


def change_config(**values) -> str:
    return json.dumps({**json.loads(CONFIG.to_json()), **values})


@pytest.mark.parametrize(
    "config",
    [
        "",
        "no JSON",
        "null",
        "[]",
        "7",
        DEEP,
        '{"a":' * 100_000,
        change_config(unknown=1),
        change_config(**{"u" * 100_000: 1}),
        change_config(memory=10**9),
        change_config(memory=-1),
        change_config(memory=10**4000),
        change_config(memory=2.0),
        change_config(memory=True),
        change_config(rank="4"),
        change_config(router_width=None),
        change_config(levels=[]),
        change_config(levels=[0, 0]),
        change_config(levels=[4]),
        change_config(levels=[[0]]),
        change_config(levels="01"),
        change_config(levels=5),
        change_config(levels=list(range(100_000))),
        change_config(token_budget=0),
        change_config(token_budget=float("nan")),
        change_config(token_budget=float("inf")),
        change_config(token_budget=10**300),
        change_config(token_budget="all"),
        change_config(coarse_share=-0.1),
        change_config(max_tokens=0),
        change_config(deltas=["x"]),
        change_config(deltas=[["q"]]),
        change_config(deltas=5),
        change_config(mode="best"),
        change_config(mode={}),
        change_config(weighted="yes"),
        change_config(memory="9" * 5000),
        '{"memory": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_hostile_config(path, config):
    rewrite(path, lambda metadata, _: metadata.update(config=config))
    refuse(path, "its description cannot be read")


@pytest.mark.parametrize(
    "settings", [{"memory": 4096}, {"rank": 4096}, {"router_width": 4096}, {"levels": [0, 1, 2, 3]}], ids=str
)
def test_config_that_promises_more(path, settings):
    """A description within the limits that the tensors do not keep; nothing of its size is allocated."""
    rewrite(path, lambda metadata, _: metadata.update(config=change_config(**settings)))
    refuse(path, "get the file again")


def change_architecture(**values) -> str:
    base = {"channels": dict(NARROW.channels), "embedding": NARROW.embedding, "context": NARROW.context}
    return json.dumps({**base, **values})


@pytest.mark.parametrize(
    "architecture",
    [
        "",
        "{}",
        "[]",
        "null",
        DEEP,
        change_architecture(channels=[]),
        change_architecture(channels={}),
        change_architecture(channels=None),
        change_architecture(channels={**NARROW.channels, "extra": 32}),
        change_architecture(channels=dict.fromkeys(NARROW.channels, "32")),
        change_architecture(channels=dict.fromkeys(NARROW.channels, 0)),
        change_architecture(channels=dict.fromkeys(NARROW.channels, 10**9)),
        change_architecture(embedding=True),
        change_architecture(embedding=-128),
        change_architecture(embedding=128.0),
        change_architecture(embedding=[1]),
        change_architecture(context=10**30),
        change_architecture(context=None),
    ],
    ids=lambda text: text[:40],
)
def test_hostile_architecture(path, architecture):
    rewrite(path, lambda metadata, _: metadata.update(architecture=architecture))
    refuse(path, "its description cannot be read")


@pytest.mark.parametrize(
    "architecture",
    [change_architecture(embedding=129), change_architecture(channels=dict.fromkeys(NARROW.channels, 65536))],
    ids=["embedding", "channels"],
)
def test_architecture_that_the_tensors_do_not_have(path, architecture):
    rewrite(path, lambda metadata, _: metadata.update(architecture=architecture))
    refuse(path, "has shape")


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
