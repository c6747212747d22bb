"""Files that are no students, or claim what they do not hold, give one error that helps."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from student_files import CONFIG, NARROW, build, refuse, rewrite

from dha.checkpoint import save_student

DEEP = "[" * 100_000


@pytest.fixture
def path(tmp_path):
    """A right file."""
    path = tmp_path / "student.safetensors"
    save_student(path, build(), teacher="0123456789abcdef", prediction="v", training={"steps": 7})
    return path


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


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file of this system can be opened but not read")
def test_a_file_that_the_system_does_not_hand_out_is_not_called_a_bad_download(tmp_path):
    path = tmp_path / "student.safetensors"
    path.symlink_to("/proc/self/mem")
    refuse(path, "cannot be read", "check its permissions and the disk")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read every file")
def test_a_file_that_may_not_be_read_is_not_called_missing(path):
    path.chmod(0)
    refuse(path, "Permission denied", "check its permissions and the disk")


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
        change_config(gather="yes"),
        change_config(blend="yes"),
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
