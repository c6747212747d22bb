"""DKD Train refuses models, names and inputs that it cannot train with, and hands over patched weights."""

from pathlib import Path

import pytest
import torch
from conftest import relate
from filelock import FileLock
from test_refusal import SD15, build_model


@pytest.fixture(scope="module")
def parts(studio, host):
    model, clip, vae = host.call("CheckpointLoaderSimple", ckpt_name=studio.checkpoint.name)
    return {"model": model, "clip": clip, "vae": vae}


def attempt(studio, parts, **inputs):
    settings = {"name": "attempt", "data_folder": "", "prompts": "owl", "preset": "mini", "steps": 2, "size": 0}
    return studio.host.call("DKDTrain", **{**settings, **parts, **inputs})


def test_a_model_after_apply_dha_is_refused(studio, parts):
    with pytest.raises(ValueError, match="DKD Train: .*went through Apply DHA.*connect the model from before"):
        attempt(studio, parts, model=studio.apply())


def test_a_model_that_is_not_sd_2_is_refused(studio, parts):
    with pytest.raises(ValueError, match="DKD Train: .*Stable Diffusion 1.x"):
        attempt(studio, parts, model=build_model("SD15", SD15))


def test_an_inpainting_model_is_refused(studio, parts):
    wide = {"in_channels": 9, "use_linear_in_transformer": True, "context_dim": 128}
    with pytest.raises(ValueError, match="DKD Train: .*inpainting.*9 input channels"):
        attempt(studio, parts, model=build_model("SD20", {**SD15, **wide}))


def test_another_prediction_type_than_the_checkpoints_is_refused(studio, host, parts):
    host.load_extra("model_advanced")
    kind = "v_prediction" if parts["model"].model.model_type.name == "EPS" else "eps"
    changed = studio.call("ModelSamplingDiscrete", model=parts["model"], sampling=kind, zsnr=False)
    with pytest.raises(ValueError, match="DKD Train: a ModelSamplingDiscrete node"):
        attempt(studio, parts, model=changed)


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "a\\b", ".hidden", "a\nb", "x" * 81, "end."])
def test_a_name_that_is_no_plain_file_name_is_refused(studio, parts, name):
    with pytest.raises(ValueError, match="DKD Train cannot call a student"):
        attempt(studio, parts, name=name)


def test_a_student_from_elsewhere_is_not_replaced(studio, parts):
    path = studio.write_student("precious")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="already has a precious.safetensors that was not trained here"):
        attempt(studio, parts, name="precious")
    assert path.read_bytes() == before


def test_a_student_of_the_pack_is_not_hidden(studio, parts):
    """The user's own folder comes first: the example workflows would draw with what is trained there."""
    with pytest.raises(ValueError, match="already has a mini-sd21-dha.safetensors that was not trained here"):
        attempt(studio, parts, name="mini-sd21-dha")


def find_runs(name: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "dkd" / name


def test_a_trainer_that_cannot_be_started_leaves_no_teacher(studio, parts, module, monkeypatch, tmp_path):
    monkeypatch.setattr(module("train_process"), "build_command", lambda _: [str(tmp_path / "no-python")])
    with pytest.raises(FileNotFoundError, match="no-python"):
        attempt(studio, parts, name="unstarted")
    assert [path.name for path in find_runs("unstarted").glob("*/*.toml")] == ["run.toml"]
    assert not [*find_runs("unstarted").rglob("*.safetensors*")]


def test_what_another_server_trains_is_left_to_it(studio, parts, module, monkeypatch, tmp_path):
    monkeypatch.setattr(module("train_process"), "build_command", lambda _: [str(tmp_path / "no-python")])
    with pytest.raises(FileNotFoundError):  # so that there is a folder
        attempt(studio, parts, name="shared")
    (folder,) = find_runs("shared").iterdir()
    for name in ("teacher.safetensors", "train.log"):
        (folder / name).write_text("the other's")
    with FileLock(folder / "server.lock"), pytest.raises(RuntimeError, match="another ComfyUI .*trains 'shared'"):
        attempt(studio, parts, name="shared")
    for name in ("teacher.safetensors", "train.log"):
        assert (folder / name).read_text() == "the other's"


def test_neither_folder_nor_prompts_is_explained(studio, parts):
    with pytest.raises(ValueError, match="neither a data folder nor prompts"):
        attempt(studio, parts, prompts=" \n")


def test_patched_weights_are_in_the_teachers_file_and_not_in_the_model(module, parts, tmp_path):
    import comfy.sd

    export, name = module("export_teacher"), "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    model, others = parts["model"], (parts["clip"], parts["vae"])
    before = model.model.diffusion_model.state_dict()[name].clone()
    change = torch.randn_like(before)
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{name}": (change,)}, 0.5)
    with torch.inference_mode():
        export.write_checkpoint(tmp_path / "patched.safetensors", weights := export.collect_weights(patched, *others))
        keys = [export.hash_weights(weights)]
        keys += [export.hash_weights(export.collect_weights(each, *others)) for each in (model, patched)]
    assert keys[0] == keys[2] != keys[1]
    module("train").free_models()
    assert torch.equal(model.model.diffusion_model.state_dict()[name], before)
    loaded, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "patched.safetensors"))
    assert relate(loaded.model.diffusion_model.state_dict()[name], before + 0.5 * change) < 1e-3
    for found, expected in ((clip.get_sd(), others[0].get_sd()), (vae.get_sd(), others[1].get_sd())):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert loaded.model.model_type == model.model.model_type


def test_a_student_without_its_record_is_no_finished_run(module, tmp_path):
    """The trainer may be killed between the two files."""
    run = module("train_run").Run("owl", tmp_path, 3)
    run.student.write_bytes(b"student")
    assert not run.is_finished
    run.record.write_text("{}")
    assert run.is_finished
