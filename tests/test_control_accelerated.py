"""Apply Frequency Control with `accelerate`: the model's DHA runs in the control's branch too."""

import copy

import pytest
import torch
from conftest import TRAINED, make_student, relate
from control_files import draw_source, load, predict, steer, write_control

from dha.config import DHAConfig
from dha.control import FCNet, apply_pairs
from dha.control_file import load_control
from dha.control_weights import merge_weights
from dha.frequency import filter_band
from dha.patch import make_patches, plain_attention


@pytest.fixture(scope="module")
def control(studio):
    return load(studio, "accelerated")


def accelerate(studio, control, source, model=None, **settings):
    """Apply Frequency Control with its last input switched on."""
    base = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "shuffle_seed": 0}
    inputs = {"model": model or studio.model, "control": control, "source": {"samples": source}}
    return studio.call("DHAApplyFrequencyControl", **inputs, **{**base, **settings}, accelerate=True)


def test_the_host_computes_what_the_equations_say(studio, student):
    path = write_control(studio, "accelerated-twin")
    unet, source = studio.model.model.diffusion_model, draw_source(2, (136, 88))
    branch = FCNet(copy.deepcopy(unet))
    branch.load_state_dict(merge_weights(unet.state_dict(), load_control(path).weights))
    x, context = draw_source(2, (136, 88), seed=1), torch.randn(2, 77, 128)
    loaded, dha = studio.call("DHALoadFrequencyControl", control_name=path.name), studio.apply(student=student)
    model = accelerate(studio, loaded, source, dha, strength=0.6)
    with torch.inference_mode():
        sampling = studio.model.get_model_object("model_sampling")
        sigma = torch.full((2,), 2.0)
        noisy, t = sampling.calculate_input(sigma, x), sampling.timestep(sigma).float()
        hint = branch.embed_hint(filter_band(studio.model.model.process_latent_in(source), "low"))
        own, options = (
            make_patches(make_student(studio.architecture), plain_attention).as_options() | {"sigmas": sigma}
            for _ in range(2)
        )
        pairs = [pair.scale(0.6) for pair in branch(noisy, hint, t, context, own)]
        options = apply_pairs(options, pairs)
        expected = sampling.calculate_denoised(sigma, unet(noisy, t, context, transformer_options=options), x)
    assert relate(predict(steer(studio, loaded, source, dha, strength=0.6), x, context), expected) > 1e-3
    assert relate(predict(model, x, context), expected) < 2e-3, "more than fp16 in the student's file explains"


def test_without_dha_it_changes_nothing(studio, control, source):
    assert torch.equal(studio.draw(accelerate(studio, control, source)), studio.draw(steer(studio, control, source)))


def test_at_no_strength_it_is_the_same_model(studio, student, control, source):
    dha = studio.apply(student=student)
    assert accelerate(studio, control, source, dha, strength=0.0) is dha


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_the_order_of_dha_and_control_does_not_matter(studio, student, control, source, cfg):
    after = accelerate(studio, control, source, studio.apply(student=student))
    before = studio.apply(accelerate(studio, control, source), student=student)
    drawn = [studio.draw(model, cfg=cfg, batch=2) for model in (after, before)]
    whole = studio.draw(steer(studio, control, source, studio.apply(student=student)), cfg=cfg, batch=2)
    assert relate(*drawn) < 1e-5 and relate(drawn[0], whole) > 1e-4


def test_where_a_presets_trained_parts_rest_they_rest_in_the_branch_too(studio, student, control, source):
    trained, free = (
        accelerate(studio, control, source, studio.apply(student=each, preset="quality")) for each in (student, None)
    )
    late = {"steps": 6, "denoise": 0.4}
    assert torch.equal(studio.draw(trained, **late), studio.draw(free, **late))
    assert relate(studio.draw(trained, **late), studio.draw(steer(studio, control, source), **late)) > 1e-4
    assert relate(studio.draw(trained), studio.draw(free)) > 1e-4


def test_with_all_tokens_as_keys_it_is_the_steered_model(studio, student, control, source):
    whole = studio.apply(student=student, budget=1.0)
    expected = studio.draw(steer(studio, control, source))
    assert relate(studio.draw(accelerate(studio, control, source, whole)), expected) < 1e-5


def test_outside_dhas_percents_the_branch_is_whole(studio, student, control, source):
    """The first of the two steps lies at 0 %, the second near 100 %."""
    late, between = (studio.apply(student=student, start=s, end=e) for s, e in ((0.5, 1.0), (0.3, 0.7)))
    found, whole = (apply(studio, control, source, between) for apply in (accelerate, steer))
    assert torch.equal(studio.draw(found), studio.draw(whole))
    found, whole = (apply(studio, control, source, late) for apply in (accelerate, steer))
    assert relate(studio.draw(found), studio.draw(whole)) > 1e-4


def test_a_training_free_student_runs_in_the_branch_too(studio, control, source):
    dha = studio.apply(levels="finest")
    assert relate(*(studio.draw(apply(studio, control, source, dha)) for apply in (accelerate, steer))) > 1e-4


def test_a_published_student_leaves_the_branch_whole(studio, control, source):
    config = DHAConfig(mode="official", levels=(1,), norm_groups=4)
    dha = studio.apply(student=studio.load_student("published", config=config))
    drawn = [studio.draw(apply(studio, control, source, dha)) for apply in (accelerate, steer)]
    assert torch.equal(*drawn)


def test_patches_of_others_stay_out_of_the_branch(studio, student, control, source):
    """Seen by what the branch gives: a ToMe after Apply DHA changes the picture, but none of the pairs."""
    loaded, found = load(studio, "listening"), []
    branch = loaded.build_for(studio.model).model
    dha, seen = studio.apply(student=student), {}
    tome = studio.call("TomePatchModel", model=dha, ratio=0.5)
    branch.register_forward_hook(lambda _module, inputs, pairs: found.append((inputs[-1], pairs)))
    x, context = draw_source(), torch.randn(1, 77, 128)
    for model in (dha, tome):
        seen[model] = predict(accelerate(studio, loaded, source, model), x, context)
    assert relate(seen[tome], seen[dha]) > 1e-5
    assert all(
        torch.equal(a.add, b.add) and torch.equal(a.mul, b.mul) for a, b in zip(found[0][1], found[1][1], strict=True)
    )
    assert "attn1" in found[0][0]["patches_replace"], "DHA does not run in the branch; this test would prove nothing"


def test_who_watches_the_routing_sees_the_unet_alone(studio, student, control, source):
    from dha.patch import WATCH

    model, sites = accelerate(studio, control, source, studio.apply(student=student)), []
    model.model_options["transformer_options"][WATCH] = lambda site, *_: sites.append(site.name)
    predict(model, draw_source(), torch.randn(1, 77, 128))
    assert (
        len(sites)
        == len(set(sites))
        == sum(site.level in TRAINED.levels for site in make_student(studio.architecture).list_sites())
    )
