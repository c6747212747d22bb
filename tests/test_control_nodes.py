"""Frequency control in a real ComfyUI: what it computes, what it composes with, what it leaves alone."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import relate
from safetensors.torch import load_file, save_file

from dha.control import FCNet, make_decoder_patch
from dha.control_file import ControlConfig, ControlFile, load_control, save_control
from dha.control_weights import ENCODER, list_shapes, merge_weights
from dha.frequency import filter_band
from dha.sites import SITES

SIZES = {"wide": (192, 64), "odd": (136, 88), "large": (256, 256)}


def draw_weights(unet, rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights as if trained: every part of the branch is large enough to be seen in a picture."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    base = unet.state_dict()
    for name, shape in list_shapes(FCNet(copy.deepcopy(unet)), rank).items():
        if rank == 0 and name.startswith(ENCODER):
            weights[name] = base[name].float() * (1 + 0.1 * torch.randn(shape, generator=generator))
        elif name.endswith(".up") or len(shape) == 1:
            weights[name] = 0.02 * torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.randn(shape, generator=generator) * 0.7 * shape[1:].numel() ** -0.5
    return weights


def write_control(studio, name: str, band: str = "low", rank: int = 4, seed: int = 0):
    """A control file for the studio's teacher in ComfyUI's models/dha_control."""
    unet = studio.model.model.diffusion_model
    path = studio.base / "models" / "dha_control" / f"{name}.safetensors"
    weights = draw_weights(unet, rank, seed)
    save_control(path, ControlFile(ControlConfig(band, rank), studio.architecture, weights, "test", "v"))
    return path


def load(studio, name: str, **settings):
    return studio.call("DHALoadFrequencyControl", control_name=write_control(studio, name, **settings).name)


def steer(studio, control, source, model=None, strength=1.0, start=0.0, end=1.0, seed=0):
    """Apply Frequency Control with the defaults of the node, by default to the teacher."""
    return studio.call(
        "DHAApplyFrequencyControl",
        model=model or studio.model,
        control=control,
        source={"samples": source},
        strength=strength,
        start_percent=start,
        end_percent=end,
        shuffle_seed=seed,
    )


def draw_source(batch: int = 1, size=(128, 128), seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, size[1] // 8, size[0] // 8, generator=generator)


@pytest.fixture(scope="module")
def control(studio):
    return load(studio, "low")


@pytest.fixture(scope="module")
def source():
    return draw_source()


@pytest.fixture(scope="module")
def steered(studio, control, source):
    """What the control alone draws."""
    return studio.draw(steer(studio, control, source))


@torch.inference_mode()
def predict(model, x, context, halves=(0,), sigma: float = 2.0):
    """One call of the UNet as ComfyUI's sampler makes it: the model's own wrappers and patches."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    sigmas = torch.full((len(x),), sigma)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    options |= {"cond_or_uncond": list(halves), "sigmas": sigmas[:1]}
    found = model.model.apply_model(x, sigmas, c_crossattn=context, transformer_options=options)
    model.cleanup()
    return found


@pytest.mark.parametrize("band", ["mini", "low", "mid", "high"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_host_computes_what_the_equations_say(studio, band, rank):
    path = write_control(studio, f"twin-{band}-{rank}", band, rank)
    unet, source = studio.model.model.diffusion_model, draw_source(2, (136, 88))
    branch = FCNet(copy.deepcopy(unet))
    branch.load_state_dict(merge_weights(unet.state_dict(), load_control(path).weights))
    x, context = draw_source(2, (136, 88), seed=1), torch.randn(2, 77, 128)
    model = steer(studio, studio.call("DHALoadFrequencyControl", control_name=path.name), source, strength=0.6, seed=5)
    found = predict(model, x, context)
    with torch.inference_mode():
        sampling = studio.model.get_model_object("model_sampling")
        sigma = torch.full((2,), 2.0)
        noisy, t = sampling.calculate_input(sigma, x), sampling.timestep(sigma).float()
        band_of_source = filter_band(studio.model.model.process_latent_in(source), band, seed=5)
        pairs = [pair.scale(0.6) for pair in branch(noisy, branch.embed_hint(band_of_source), t, context, {})]
        options = {"pairs": pairs, "patches": {"output_block_patch": [make_decoder_patch("pairs")]}}
        expected = sampling.calculate_denoised(sigma, unet(noisy, t, context, transformer_options=options), x)
    assert relate(predict(studio.model, x, context), expected) > 1e-3
    assert relate(found, expected) < 1e-5


@pytest.mark.parametrize(
    "settings", [{"strength": 0.0}, {"start": 0.5, "end": 0.5}, {"start": 0.7, "end": 0.2}], ids=str
)
def test_nothing_asked_is_the_same_model(studio, control, source, settings):
    assert steer(studio, control, source, **settings) is studio.model


def test_leaves_no_trace(studio, undisturbed, steered):
    assert 1e-3 < relate(steered, undisturbed) < 5, "the control is not seen, or not sane"
    assert torch.equal(studio.draw(), undisturbed)


def test_little_strength_is_little_control(studio, control, source, undisturbed):
    distances = [relate(studio.draw(steer(studio, control, source, strength=s)), undisturbed) for s in (1e-4, 0.1, 1.0)]
    assert distances[0] < 1e-3 and distances[0] < distances[1] < distances[2]


def test_outside_its_percents_it_does_nothing(studio, control, source, undisturbed, steered):
    """The first of the two steps lies at 0 %, the second near 100 %."""
    between, first, last = (steer(studio, control, source, start=s, end=e) for s, e in ((0.3, 0.7), (0, 0.5), (0.5, 1)))
    assert torch.equal(studio.draw(between), undisturbed)
    drawn = studio.draw(first), studio.draw(last)
    assert all(relate(found, other) > 1e-4 for found in drawn for other in (undisturbed, steered))
    assert relate(*drawn) > 1e-4


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_hint_is_computed_once_in_a_sampling(studio, source, monkeypatch, sampler):
    loaded, count = load(studio, "counted"), []
    branch = loaded.build_for(studio.model).model
    embed = branch.embed_hint
    monkeypatch.setattr(branch, "embed_hint", lambda hint: count.append(len(hint)) or embed(hint))
    model = steer(studio, loaded, source)
    studio.draw(model, steps=6, batch=3, sampler=sampler)
    assert count == [3]
    studio.draw(model, steps=2)
    assert count == [3, 1]


def test_both_halves_of_guidance_get_the_same_control(studio, control):
    model, x = steer(studio, control, draw_source(2)), draw_source(2, seed=3)
    context = torch.randn(4, 77, 128)
    both = predict(model, torch.cat([x, x]), context, halves=(1, 0))
    alone = [predict(model, x, context[:2]), predict(model, x, context[2:])]
    assert relate(both, torch.cat(alone)) < 1e-5


def test_every_picture_of_a_batch_has_its_own_source(studio, control):
    sources, x, context = draw_source(2), draw_source(3, seed=3), torch.randn(3, 77, 128)
    together = predict(steer(studio, control, sources), x, context)
    for n in range(3):
        model = steer(studio, control, sources[n % 2 : n % 2 + 1])
        assert relate(predict(model, x[n : n + 1], context[n : n + 1]), together[n : n + 1]) < 1e-5
    assert relate(predict(steer(studio, control, sources.flip(0)), x, context)[:2], together[:2]) > 1e-3


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_sizes(studio, control, size):
    drawn = studio.draw(steer(studio, control, draw_source(size=size)), size=size, batch=2)
    assert drawn.shape == (2, 4, size[1] // 8, size[0] // 8)
    assert 1e-3 < relate(drawn, studio.draw(size=size, batch=2)) < 5


def test_a_source_of_another_size_is_scaled(studio, control):
    source = torch.ones(1, 4, 8, 8)
    small, large = (steer(studio, control, s) for s in (source, torch.ones(1, 4, 16, 16)))
    assert relate(studio.draw(small), studio.draw(large)) < 1e-5


def test_only_the_mini_band_follows_the_shuffle_seed(studio, control, source, steered):
    assert torch.equal(studio.draw(steer(studio, control, source, seed=9)), steered)
    mini = load(studio, "mini", band="mini")
    first, second = (studio.draw(steer(studio, mini, source, seed=seed)) for seed in (1, 2))
    assert relate(first, second) > 1e-4


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


def find_loaded(module):
    import comfy.model_management

    return [entry for entry in comfy.model_management.current_loaded_models if entry.model.model is module]


def test_memory_is_counted_and_freed(studio, source):
    import comfy.model_management

    loaded = load(studio, "passing", seed=2)
    patched = steer(studio, loaded, source)
    (branch,) = patched.get_additional_models()
    module, size = weakref.ref(branch.model), branch.model_size()
    assert size == sum(p.numel() * p.element_size() for p in branch.model.parameters()) > 0
    studio.draw(patched)
    (entry,) = find_loaded(module())
    assert entry.model_memory() == size
    del entry
    comfy.model_management.unload_all_models()
    assert not find_loaded(module())
    studio.draw(patched)
    assert find_loaded(module()), "a freed branch does not come back"
    comfy.model_management.free_memory(1e30, studio.model.load_device)
    del patched, loaded, branch
    gc.collect()
    assert module() is None, "something still holds the branch's weights"


def test_a_clone_and_a_second_use_share_the_branch(studio, control, source):
    first, second = steer(studio, control, source), steer(studio, control, source, strength=0.5)
    branches = {id(model.get_additional_models()[0].model) for model in (first, first.clone(), second)}
    assert len(branches) == 1


def test_weights_are_not_saved_into_a_checkpoint(studio, control, source):
    state = steer(studio, control, source).model_state_dict()
    assert state.keys() == studio.model.model_state_dict().keys()


def test_models_folder_is_known(studio, control):
    import folder_paths

    assert "low.safetensors" in folder_paths.get_filename_list("dha_control")
    assert "low.safetensors" not in folder_paths.get_filename_list("dha")


def test_changed_file_is_loaded_again(studio):
    node = studio.host.nodes.NODE_CLASS_MAPPINGS["DHALoadFrequencyControl"]
    name = write_control(studio, "changing").name
    before = node.fingerprint_inputs(control_name=name)
    assert node.fingerprint_inputs(control_name=name) == before
    write_control(studio, "changing", rank=5)
    assert node.fingerprint_inputs(control_name=name) != before


@pytest.mark.parametrize("shape", [(1, 16, 16, 16), (1, 4, 3, 16, 16)], ids=str)
def test_a_source_of_another_latent_space_is_refused(studio, control, shape):
    with pytest.raises(ValueError, match="the source is .*expected latents"):
        steer(studio, control, torch.zeros(shape))


def test_weights_that_are_not_the_models_are_refused_by_name(studio, source):
    path = write_control(studio, "spoilt")
    good = load_file(path)
    for change, words in {
        "missing": "1 tensors missing",
        "surplus": "1 surplus",
        "shape": "has shape",
        "value": "not finite",
        "type": "expected a floating-point type",
    }.items():
        weights = dict(good)
        first = "control_model.hint_add.weight"
        if change == "missing":
            del weights[first]
        elif change == "surplus":
            weights["control_model.more"] = torch.zeros(1)
        else:
            wrong = {"shape": torch.zeros(1), "value": weights[first] * float("nan"), "type": weights[first].int()}
            weights[first] = wrong[change]
        rewrite(path, weights)
        loaded = studio.call("DHALoadFrequencyControl", control_name=path.name)
        with pytest.raises(ValueError, match=f"spoilt.safetensors.*{words}"):
            steer(studio, loaded, source)


def rewrite(path, weights) -> None:
    """Other tensors below the same metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(weights, path, metadata=metadata)


def test_the_filter_node_shows_what_the_band_keeps(studio):
    (_, _, vae) = studio.host.call("CheckpointLoaderSimple", ckpt_name=studio.checkpoint.name)
    latent = {"samples": draw_source(2, (136, 88)), "batch_index": [4, 5]}
    settings = {"samples": latent, "vae": vae, "band": "mini", "shuffle_seed": 3}
    kept, picture = studio.host.call("DHAFrequencyFilter", **settings, scaled=True)
    assert torch.equal(kept["samples"], filter_band(latent["samples"], "mini", seed=3))
    assert kept["batch_index"] == [4, 5] and picture.shape == (2, 88, 136, 3)
    with torch.inference_mode():
        assert torch.equal(picture, vae.decode(kept["samples"]))
    literal, _ = studio.host.call("DHAFrequencyFilter", **settings, scaled=False)
    assert torch.equal(literal["samples"], filter_band(latent["samples"], "mini", seed=3, scaled=False))
    assert relate(literal["samples"], kept["samples"]) > 0.1
