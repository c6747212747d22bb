"""What Apply DHA refuses, and whether the message helps."""

import dataclasses

import pytest
import torch

from dha.config import DHAConfig

NARROW = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "model_channels": 32,
    "dtype": torch.float32,
}
SD15 = {
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 96,
    "adm_in_channels": None,
}
SDXL = {
    "num_res_blocks": [2] * 3,
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "context_dim": 128,
    "adm_in_channels": 64,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 16,
    "hidden_size": 32,
    "mlp_ratio": 1.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "dtype": torch.float32,
}


def build_model(name: str, config: dict):
    """A narrow model of one of ComfyUI's architectures in a model patcher, weights uninitialised."""
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    unet = {} if "image_model" in config else NARROW
    detected = getattr(comfy.supported_models, name)({**unet, **config})
    detected.set_inference_dtype(torch.float32, None)
    device = torch.device("cpu")
    return ModelPatcher(detected.get_model({}, "", device), device, device)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("SD15", SD15, "Stable Diffusion 1.x UNet.*DHA serves .*2.x"),
        ("SDXL", SDXL, "SDXL UNet.*connect a Stable Diffusion 2"),
        ("Flux", FLUX, "Flux, SD3 and other transformers.*connect a Stable Diffusion 2"),
    ],
    ids=["SD15", "SDXL", "Flux"],
)
@pytest.mark.parametrize("trained", [False, True], ids=["training-free", "student"])
def test_other_architectures(studio, student, name, config, words, trained):
    model = build_model(name, config)
    with pytest.raises(ValueError, match=words):
        studio.apply(model, student=student if trained else None)
    assert studio.apply(model, budget=0.0) is model, "0 touches nothing, so it refuses nothing"


def test_student_of_other_widths(studio):
    wide = dataclasses.replace(
        studio.architecture, channels={k: 2 * v for k, v in studio.architecture.channels.items()}
    )
    student = studio.load_student("wide", architecture=wide)
    with pytest.raises(
        ValueError, match="wide.safetensors was trained for sd2-unet-.*the connected model is sd2-unet-.*load a student"
    ):
        studio.apply(student=student)


def test_student_of_another_time_embedding(studio):
    other = dataclasses.replace(studio.architecture, embedding=studio.architecture.embedding + 32)
    with pytest.raises(
        ValueError, match=f"time embedding {other.embedding}.*time embedding {studio.architecture.embedding}"
    ):
        studio.apply(student=studio.load_student("late", architecture=other))


def test_applied_twice(studio, student):
    once = studio.apply(student=student)
    for again in (student, None):
        with pytest.raises(ValueError, match="already went through Apply DHA; connect the model from before it"):
            studio.apply(once, student=again)
    assert studio.apply(once, budget=0.0) is once
    lora_between = once.clone()
    with pytest.raises(ValueError, match="already went through Apply DHA"):
        studio.apply(lora_between)


def test_levels_without_training(studio):
    student = studio.load_student("finest", config=DHAConfig(levels=(0,), rank=4))
    assert studio.apply(student=student, levels="two finest") is not studio.model
    only_coarse = studio.load_student("coarse", config=DHAConfig(levels=(2,), rank=4))
    with pytest.raises(ValueError, match=r"coarse.safetensors was trained for levels \(2,\).*use auto"):
        studio.apply(student=only_coarse, levels="finest")


def test_other_prediction_is_said(studio, student, caplog):
    assert studio.model.model.model_type.name == "V_PREDICTION"
    made = student.metadata["prediction"]
    try:
        student.metadata["prediction"] = "v"
        studio.apply(student=student)
        assert not caplog.text
        student.metadata["prediction"] = "eps"
        studio.apply(student=student)
    finally:
        student.metadata["prediction"] = made
    assert "first.safetensors was trained on eps prediction, this model uses V_PREDICTION" in caplog.text


def test_wrong_file_in_the_loader(studio):
    (studio.base / "models" / "dha" / "cut.safetensors").write_bytes(studio.write_student("whole").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.safetensors is not a whole safetensors file.*download it again"):
        studio.call("LoadDHAStudent", student_name="cut.safetensors")
    with pytest.raises(FileNotFoundError):
        studio.call("LoadDHAStudent", student_name="absent.safetensors")
