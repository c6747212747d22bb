"""Frequency control in a real ComfyUI: what it computes, what it leaves alone, what it refuses."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import relate
from control_files import draw_source, load, predict, steer, write_control
from safetensors.torch import load_file, save_file
from test_refusal import FLUX, SDXL, build_model

from dha.control import FCNet, make_decoder_patch
from dha.control_file import load_control
from dha.control_weights import merge_weights
from dha.frequency import filter_band

WAN = {"image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "out_dim": 16, "num_layers": 1, "num_heads": 2}
WAN |= {name: 64 for name in ("dim", "ffn_dim", "freq_dim", "text_dim")}
SIZES = {"wide": (192, 64), "odd": (136, 88), "large": (256, 256)}


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


def test_two_controls_have_a_window_each(studio, control, source):
    other, x, context = load(studio, "high", band="high", seed=1), draw_source(seed=3), torch.randn(1, 77, 128)
    early, late = {"start": 0.0, "end": 0.5}, {"start": 0.5, "end": 1.0}
    both = steer(studio, other, source, model=steer(studio, control, source, **early), **late)
    for sigma, alone in ((10.0, steer(studio, control, source)), (0.1, steer(studio, other, source))):
        found, plain = (predict(model, x, context, sigma=sigma) for model in (both, studio.model))
        assert torch.equal(found, predict(alone, x, context, sigma=sigma)) and not torch.equal(found, plain)


def test_a_window_does_not_break_a_compiled_graph(studio, control, source):
    """It is asked before the UNet is entered; inside, noise levels would have to be fetched from the device."""
    ((wrap,),) = steer(studio, control, source, end=0.5).wrappers["diffusion_model"].values()
    x, level, context = draw_source(), torch.tensor([0.1]), torch.randn(1, 77, 128)

    def find_pairs(x, level):
        options = {"sigmas": level, "dha_control_stretch": None}
        return wrap(lambda *given: given[5]["dha_control"], x, level, context, None, None, options)

    assert torch.compile(find_pairs, backend="eager", fullgraph=True)(x, level) is None


def test_compiled_code_keeps_no_hint(studio, control, source, module):
    branch, x = control.build_for(studio.model).model, draw_source()
    hint = module("control_branch").Hint(source, "low", 0)
    with torch.inference_mode():
        found = torch.compile(lambda x: hint.embed(branch, x, 1).add, backend="eager")(x)
        assert not hint.embedded
        assert relate(found, hint.embed(branch, x, 1).add) < 1e-6 and hint.embedded


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


@pytest.mark.parametrize(("name", "config"), [("SDXL", SDXL), ("Flux", FLUX), ("WAN21_T2V", WAN)])
def test_a_model_of_another_family_is_refused(studio, control, name, config):
    """Whatever its latents are like: a video model's have another mean in each of 16 channels."""
    with pytest.raises(ValueError, match="this model is .*connect a Stable Diffusion 2"):
        steer(studio, control, draw_source(2), model=build_model(name, config))


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
