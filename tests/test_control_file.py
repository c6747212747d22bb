"""The control file keeps what it is given, and every wrong file gets one clear error; published ones are converted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dha.checkpoint import save_student
from dha.config import DHAConfig
from dha.control_file import ControlConfig, ControlFile, ControlFileError, load_control, read_published, save_control
from dha.control_weights import merge_weights
from dha.sites import SITES, Architecture
from dha.student import Student

WIDTHS = (32, 64, 96, 96)
NARROW = Architecture({site.name: WIDTHS[site.level] for site in SITES}, embedding=128, context=48)


def write(path, band="mid", rank=2, weights=None, **changes):
    weights = {"hint_add.weight": torch.randn(32, 512, 1, 1)} if weights is None else weights
    control = ControlFile(ControlConfig(band, rank), NARROW, weights, "0123456789abcdef", "v", {"steps": 7})
    save_control(path, control)
    if changes:
        with safe_open(path, "pt") as file:
            metadata = {**file.metadata(), **changes}
        save_file(load_file(path), path, metadata=metadata)
    return path


def refuse(path, *words: str) -> None:
    with pytest.raises(ControlFileError) as caught:
        load_control(path)
    message = str(caught.value)
    assert path.name in message and len(message) < 700 and "\n" not in message, message
    for word in words:
        assert word in message, message


def test_round_trip(tmp_path):
    weights = {"a.weight.up": torch.randn(4, 2), "a.weight.down": torch.randn(2, 3), "hint_add.bias": torch.randn(5)}
    loaded = load_control(write(tmp_path / "new" / "c.safetensors", weights=weights))
    assert loaded.config == ControlConfig("mid", 2) and loaded.architecture == NARROW
    assert (loaded.teacher, loaded.prediction, loaded.training) == ("0123456789abcdef", "v", {"steps": 7})
    assert loaded.weights.keys() == weights.keys()
    assert all(torch.equal(loaded.weights[name], weights[name].half()) for name in weights)


def test_a_loaded_control_has_let_go_of_its_file(tmp_path):
    """One that stays mapped could not be replaced on Windows, and writing over it changes or ends who reads it."""
    path = write(tmp_path / "c.safetensors", weights={"hint_add.bias": torch.ones(5)})
    loaded = load_control(path)
    with path.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"\0" * 10)
    assert torch.equal(loaded.weights["hint_add.bias"], torch.ones(5).half())


def test_a_file_from_before_there_was_external_attention_is_one_of_self_attention(tmp_path):
    path = write(tmp_path / "old.safetensors", config=json.dumps({"band": "mid", "rank": 2}))
    assert load_control(path).config == ControlConfig("mid", 2, "self", 32)


def test_names_in_the_file_are_the_published_ones_and_its_kind_is_said(tmp_path):
    with safe_open(write(tmp_path / "c.safetensors"), "pt") as file:
        assert list(file.keys()) == ["control_model.hint_add.weight"]
        assert file.metadata()["format"] == "dha-control" and file.metadata()["version"] == "1"
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v2/dha-control"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "dha-student"}, ["is not a frequency control", "'dha-student'", "expected 'dha-control'"]),
        ({"version": "2"}, ["has version 2", "reads up to 1", "update the pack to use this frequency control"]),
        ({"version": "one"}, ["has version 'one'", "get the file again"]),
        ({"config": "{"}, ["its description cannot be read", "get the file again"]),
        ({"config": "[]"}, ["its description cannot be read"]),
        ({"config": json.dumps({"band": "medium"})}, ["unknown frequency band 'medium'", "mini, low, mid, high"]),
        ({"config": json.dumps({"band": "low", "rank": -1})}, ["rank -1"]),
        ({"config": json.dumps({"band": "low", "rank": True})}, ["rank True"]),
        ({"config": json.dumps({"band": "low", "attention": "none"})}, ["unknown attention 'none'", "self, external"]),
        ({"config": json.dumps({"band": "low", "rank": 4, "attention": "external"})}, ["rank 4", "expected 0"]),
        ({"config": json.dumps({"band": "low", "norm_groups": 3})}, ["norm_groups 3", "a power of 2 up to 32"]),
        ({"config": json.dumps({"band": ["low"]})}, ["its description cannot be read"]),
        ({"config": json.dumps({"band": "low", "more": 1})}, ["more"]),
        ({"architecture": "{}"}, ["its description cannot be read"]),
        ({"prediction": "x0"}, ["prediction 'x0'"]),
        ({"training": "3"}, ["its description cannot be read"]),
    ],
    ids=str,
)
def test_a_wrong_description_is_refused(tmp_path, changes, words):
    refuse(write(tmp_path / "wrong.safetensors", **changes), *words)


def test_files_of_other_kinds_are_refused(tmp_path):
    refuse(tmp_path / "absent.safetensors", "does not exist", "models/dha_control")
    refuse(tmp_path, "is a folder")
    cut = write(tmp_path / "cut.safetensors")
    cut.write_bytes(cut.read_bytes()[:-10])
    refuse(cut, "not a whole safetensors file", "download it again")
    text = tmp_path / "page.safetensors"
    text.write_text("<html>not found</html>")
    refuse(text, "not a whole safetensors file")
    student = tmp_path / "student.safetensors"
    save_student(student, Student(DHAConfig(memory=2), NARROW).start(), teacher="x")
    refuse(student, "is not a frequency control", "'dha-student'")
    plain = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    refuse(plain, "format 'None'", "have loaders of their own")


def test_a_weight_that_is_not_finite_is_not_saved_and_the_old_file_stays(tmp_path):
    path = write(tmp_path / "c.safetensors")
    before = path.read_bytes()
    with pytest.raises(ControlFileError, match="hint_add.weight.*not finite in fp16; the frequency control was not"):
        write(path, weights={"hint_add.weight": torch.full((2,), 1e9)})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_weights_are_changes_of_the_models_own():
    base = {"c.weight": torch.randn(6, 3, 3, 3), "c.bias": torch.randn(6), "other": torch.randn(2)}
    up, down, shift, whole = torch.randn(6, 2), torch.randn(2, 27), torch.randn(6), torch.randn(4)
    state = merge_weights(base, {"c.weight.up": up, "c.weight.down": down, "c.bias.shift": shift, "hint": whole})
    assert set(state) == {"c.weight", "c.bias", "hint"} and state["hint"] is whole
    for row in range(6):
        expected = base["c.weight"][row].flatten() + sum(up[row, r] * down[r] for r in range(2))
        torch.testing.assert_close(state["c.weight"][row].flatten(), expected)
    torch.testing.assert_close(state["c.bias"], base["c.bias"] + shift)


def build_published() -> dict[str, torch.Tensor]:
    """What conversion looks at in a published checkpoint of narrow widths."""
    state = {}
    for site in SITES:
        width = WIDTHS[site.level]
        for part in ("to_q", "to_k", "to_v"):
            state[f"model.diffusion_model.{site.name}.{part}.weight"] = torch.randn(width, width)
            if site.block[0] != "output":
                state[f"control_model.{site.name}.{part}.weight"] = torch.randn(width, width)
    branch = "control_model.input_blocks.1.1."
    state[f"{branch}proj_in.weight"] = torch.randn(32, 32)
    state[f"{branch}transformer_blocks.0.attn2.to_k.weight"] = torch.randn(32, 48)
    state["control_model.time_embed.2.weight"] = torch.randn(128, 128)
    state["control_model.input_hint_block.0.weight"] = torch.randn(512, 4, 3, 3)
    state["cond_stage_model.x"] = torch.zeros(1)
    return state


def test_a_published_checkpoint_becomes_a_control(tmp_path):
    from dha.checkpoint import fingerprint

    state = build_published()
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "global_step": 12}, path)
    control = read_published(path, "high")
    unet = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in state.items()}
    assert control.config == ControlConfig("high", 0) and control.architecture == NARROW
    assert control.teacher == fingerprint(unet) and control.prediction == "eps"
    assert control.weights.keys() == {n.removeprefix("control_model.") for n in state if n.startswith("control_model.")}
    save_control(tmp_path / "c.safetensors", control)
    assert load_control(tmp_path / "c.safetensors").training == {"converted_from": "published.ckpt"}


def test_a_checkpoint_that_would_run_code_is_refused_without_running_it(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "trap.ckpt"
    torch.save({"state_dict": build_published(), "callbacks": Trap()}, path)
    with pytest.raises(ControlFileError, match="trap.ckpt cannot be read safely"):
        read_published(path, "low")
    assert not (tmp_path / "sprung").exists()


def test_checkpoints_without_a_branch_are_refused_by_what_they_are(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(ControlFileError, match="other.ckpt is no FCDiffusion.*1 tensors.*published teacher or student"):
        read_published(path, "low")
    torch.save({"state_dict": {"student_model.control_model.a": torch.zeros(1)}}, path)
    with pytest.raises(ControlFileError, match="other.ckpt: its control branch is not FCDiffusion's"):
        read_published(path, "low")
    torch.save([1, 2], path)
    with pytest.raises(ControlFileError, match="is no FCDiffusion"):
        read_published(path, "low")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ControlFileError, match="cannot be read safely"):
        read_published(path, "low")
    with pytest.raises(ControlFileError, match="does not exist"):
        read_published(tmp_path / "absent.ckpt", "low")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file of this system can be opened but not read")
@pytest.mark.parametrize("name", ["control.safetensors", "published.ckpt"])
def test_a_file_that_the_system_does_not_hand_out_is_not_called_damaged(tmp_path, name):
    path = tmp_path / name
    path.symlink_to("/proc/self/mem")
    with pytest.raises(ControlFileError, match=f"{name} cannot be read .*check its permissions and the disk"):
        load_control(path) if path.suffix == ".safetensors" else read_published(path, "low")


def test_a_branch_of_another_shape_is_refused(tmp_path):
    state = build_published()
    del state["control_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"]
    torch.save({"state_dict": state}, tmp_path / "sd15.ckpt")
    with pytest.raises(ControlFileError, match="sd15.ckpt: its control branch is not FCDiffusion's"):
        read_published(tmp_path / "sd15.ckpt", "low")
