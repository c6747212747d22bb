"""Frequency control in a real ComfyUI, together with DHA, LoRA, ControlNet, masks and other patches."""

import pytest
import torch
from conftest import relate
from control_files import draw_source, load, steer
from safetensors.torch import load_file, save_file

from dha.sites import SITES


def test_controls_add_up_in_one_model(studio, control, source, steered):
    other = load(studio, "high", band="high", seed=1)
    both = steer(studio, other, source, model=steer(studio, control, source))
    drawn = studio.draw(both)
    assert relate(drawn, steered) > 1e-4 and relate(drawn, studio.draw(steer(studio, other, source))) > 1e-4
    assert len(both.get_additional_models()) == 2
    assert torch.equal(studio.draw(steer(studio, control, source)), steered)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_the_order_of_dha_and_control_does_not_matter(studio, student, control, source, steered, cfg):
    ours_first = studio.apply(steer(studio, control, source), student=student)
    dha_first = steer(studio, control, source, model=studio.apply(student=student))
    drawn = [studio.draw(model, cfg=cfg, batch=2) for model in (ours_first, dha_first)]
    assert relate(*drawn) < 1e-5
    assert relate(drawn[0], studio.draw(studio.apply(student=student), cfg=cfg, batch=2)) > 1e-3
    assert relate(drawn[0], studio.draw(steer(studio, control, source), cfg=cfg, batch=2)) > 1e-4
    whole = studio.apply(steer(studio, control, source), student=student, budget=1.0)
    assert relate(studio.draw(whole), steered) < 1e-5


@pytest.fixture(scope="module")
def lora(studio):
    """A LoRA of rank 4 on the cross-attention of the encoder and middle block, with ComfyUI's generic names."""
    generator, state = torch.Generator().manual_seed(3), {}
    weights = studio.model.model.diffusion_model.state_dict()
    for site in SITES[:7]:
        name = f"diffusion_model.{site.name.removesuffix('attn1')}attn2.to_v"
        rows, columns = weights[f"{name.removeprefix('diffusion_model.')}.weight"].shape
        state[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    path = studio.base / "models" / "loras" / "encoder.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return {"lora_name": path.name, "strength_model": 1.0}


def test_the_order_of_lora_and_control_does_not_matter(studio, control, source, steered, lora):
    after = studio.call("LoraLoaderModelOnly", model=steer(studio, control, source), **lora)
    before = steer(studio, control, source, model=studio.call("LoraLoaderModelOnly", model=studio.model, **lora))
    drawn = [studio.draw(model) for model in (after, before)]
    assert relate(*drawn) < 1e-5
    assert relate(drawn[0], steered) > 1e-4, "the LoRA is not seen"


def test_a_branch_is_built_on_the_weights_below_a_lora_that_is_loaded_now(studio, source, steered, lora):
    changed = studio.call("LoraLoaderModelOnly", model=studio.model, **lora)
    studio.draw(changed)
    assert changed.model.current_weight_patches_uuid == changed.patches_uuid
    fresh = steer(studio, load(studio, "low"), source)
    assert torch.equal(studio.draw(fresh), steered)


@pytest.mark.parametrize("peer", ["FreeU_V2", "HyperTile", "TomePatchModel", "PerturbedAttentionGuidance"])
@pytest.mark.parametrize("first", [True, False], ids=["peer first", "control first"])
def test_peers(studio, control, source, steered, peer, first):
    settings = {
        "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
        "HyperTile": {"tile_size": 64, "swap_size": 1, "max_depth": 0, "scale_depth": False},
        "TomePatchModel": {"ratio": 0.5},
        "PerturbedAttentionGuidance": {"scale": 3.0},
    }[peer]
    if first:
        model = steer(studio, control, source, model=studio.call(peer, model=studio.model, **settings))
    else:
        model = studio.call(peer, model=steer(studio, control, source), **settings)
    drawn, alone = studio.draw(model), studio.draw(studio.call(peer, model=studio.model, **settings))
    assert 1e-5 < relate(drawn, steered) < 5, f"{peer} is not seen"
    assert 1e-4 < relate(drawn, alone) < 5, "the control is not seen"


def test_ordinary_controlnet(studio, control, source, steered, undisturbed):
    from comfy.cldm.cldm import ControlNet

    config = {**studio.model.model.model_config.unet_config, "hint_channels": 3, "dtype": torch.float32}
    config.pop("out_channels", None)
    net, generator = ControlNet(**config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.fill_(float("norm" in name)) if weight.ndim < 2 else weight.normal_(std=0.05, generator=generator)
    path = studio.base / "models" / "controlnet" / "ordinary.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    ordinary = studio.call("ControlNetLoader", control_net_name=path.name)
    conditions = {"positive": studio.positive, "negative": studio.negative, "control_net": ordinary}
    picture = torch.rand(1, 128, 128, 3, generator=generator)
    positive, negative = studio.host.call(
        "ControlNetApplyAdvanced", **conditions, image=picture, strength=1.0, start_percent=0.0, end_percent=1.0
    )
    settings = {"positive": positive, "negative": negative}
    alone = studio.draw(**settings)
    drawn = studio.draw(steer(studio, control, source), **settings)
    assert relate(alone, undisturbed) > 1e-4, "the ControlNet does nothing; this test would prove nothing"
    assert relate(drawn, alone) > 1e-4 and 1e-5 < relate(drawn, steered) < 5


def test_masked_and_regional_prompts(studio, control, source, steered):
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    masked = studio.call(
        "ConditioningSetMask", conditioning=studio.positive, mask=mask, strength=1.0, set_cond_area="default"
    )
    both = studio.call("ConditioningCombine", conditioning_1=masked, conditioning_2=studio.positive)
    drawn = studio.draw(steer(studio, control, source), positive=both)
    assert relate(drawn, studio.draw(positive=both)) > 1e-3
    area = studio.call(
        "ConditioningSetArea", conditioning=studio.positive, width=64, height=128, x=0, y=0, strength=1.0
    )
    regional = studio.call("ConditioningCombine", conditioning_1=area, conditioning_2=studio.negative)
    drawn = studio.draw(steer(studio, control, source), positive=regional)
    assert relate(drawn, studio.draw(positive=regional)) > 1e-3


def test_inpainting(studio, control, source):
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    latent = studio.call("SetLatentNoiseMask", samples={"samples": draw_source(seed=8)}, mask=mask)
    drawn = studio.draw(steer(studio, control, source), latent=latent)
    assert relate(drawn[..., :7], latent["samples"][..., :7]) < 1e-4, "outside the mask nothing changes"
    assert relate(drawn[..., 9:], studio.draw(latent=latent)[..., 9:]) > 1e-4


def test_an_inpainting_model_is_steered_by_its_latent_channels_alone(studio, control, source, tmp_path):
    """Such a UNet sees nine channels; with no weight on the other five it does what the plain one does."""
    import comfy.sd

    state = load_file(studio.checkpoint)
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    state[entry] = torch.cat([state[entry], torch.zeros_like(state[entry][:, :1]).expand(-1, 5, -1, -1)], dim=1)
    save_file(state, tmp_path / "inpainting.safetensors")
    with torch.inference_mode():
        (model, *_) = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "inpainting.safetensors"), output_vae=False)
    assert model.model.model_config.unet_config["in_channels"] == 9
    x, inputs = draw_source(9, seed=8).view(1, 36, 16, 16), {"context": torch.randn(1, 77, 128)}
    found = []
    for each, channels in ((studio.model, 4), (model, 9)):
        steered = steer(studio, control, source, model=each)
        options = {**steered.model_options["transformer_options"], "wrappers": steered.wrappers}
        with torch.inference_mode():
            unet = each.model.diffusion_model
            found.append(unet(x[:, :channels], torch.tensor([500.0]), **inputs, transformer_options=options))
    assert relate(*found) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_precisions(studio, source, dtype):
    """Teachers kept in other precisions: the branch computes in what the UNet computes in."""
    import comfy.sd

    with torch.inference_mode():
        (model, *_) = comfy.sd.load_checkpoint_guess_config(
            str(studio.checkpoint), output_vae=False, output_clip=False, model_options={"dtype": dtype}
        )
    drawn = studio.draw(steer(studio, load(studio, "low"), source, model=model))
    assert 1e-3 < relate(drawn, studio.draw(model)) < 5
