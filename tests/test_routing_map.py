"""DHA Routing Map and what it records, in a real ComfyUI inside this process."""

import json

import pytest
import torch
from conftest import relate

from dha.config import DHAConfig
from dha.patch import WATCH

SETTINGS = {"seed": 0, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


@pytest.fixture(scope="module")
def vae(studio):
    return studio.host.call("CheckpointLoaderSimple", ckpt_name=studio.checkpoint.name)[2]


@pytest.fixture(scope="module")
def routed(studio, student):
    return studio.apply(student=student, levels="two finest")


@pytest.fixture(scope="module")
def draw_map(studio, vae):
    def run(model, level="finest", frames=2, batch=1, **settings):
        """Frames, summary and report of the node."""
        conditions = {"positive": studio.positive, "negative": studio.negative}
        latent = {"samples": torch.zeros(batch, 4, 16, 16)}
        inputs = {**SETTINGS, **conditions, **settings, "level": level, "frames": frames}
        drawn, summary, report = studio.host.call("DHARoutingMap", model=model, vae=vae, latent_image=latent, **inputs)
        return drawn, summary, json.loads(report)

    return run


@pytest.fixture(scope="module")
def module(pack):
    """The node's own module."""
    import sys

    return sys.modules[f"{pack.__name__}.nodes.routing_map"]


def record(studio, module, model, level=0, batch=1, size=(16, 16), **settings):
    import comfy.utils

    conditions = {"positive": studio.positive, "negative": studio.negative, "denoise": 1.0}
    sampling = module.Sampling(**{**SETTINGS, **conditions, **settings})
    with torch.inference_mode():
        latent = {"samples": torch.zeros(batch, 4, *size)}
        return module.record(model, sampling, latent, level, comfy.utils.ProgressBar(1))


def test_the_map_is_what_the_router_chose(studio, module, student, routed):
    """Per layer and step as many tokens as the plan says, and those with the highest scores of the layer's router."""
    seen = []

    def note(router, inputs, scores):
        seen.append(scores.detach().clone())

    site = next(site for site in student.patcher.model.list_sites() if site.level == 0)
    handle = student.patcher.model.site(site).router.register_forward_hook(note)
    try:
        recorder = record(studio, module, studio.apply(student=student, levels="finest"), cfg=1.0, steps=1)
    finally:
        handle.remove()
    (step,), (plan,) = recorder.steps, recorder.plans
    best = torch.zeros(256)
    best[seen[-1][0].topk(plan.chosen).indices] = 1
    layers = len(recorder.layers)
    assert layers == 5 and plan.tokens == 256
    assert step.chosen.sum() == pytest.approx(plan.chosen)
    assert plan.coarse <= step.kept.sum() + 1e-4 <= plan.coarse + plan.chosen + 2e-4
    assert (step.kept >= step.chosen).all()
    counts = (step.chosen.flatten() * layers).round()
    assert (counts[best.bool()] >= 1).all(), "a token that this layer chose is not on the map"


def test_the_positive_prompt_of_the_first_picture_is_shown(studio, module, routed):
    """The same map with guidance as without, whatever else is in the batch; the first step sees the same noise."""
    alone = record(studio, module, routed, cfg=1.0, steps=2).steps[0].kept
    assert torch.equal(record(studio, module, routed, cfg=4.0, steps=2).steps[0].kept, alone)


def test_it_follows_the_content(studio, module, routed):
    first, second = (record(studio, module, routed, seed=seed).steps[-1].chosen for seed in (0, 1))
    assert relate(second, first) > 0.1


def test_the_grid_moves_from_step_to_step_whatever_the_content(studio, module):
    model = studio.apply(levels="finest")
    first, second = (record(studio, module, model, seed=seed).steps for seed in (0, 1))
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(first, second, strict=True))
    assert relate(first[1].kept, first[0].kept) > 0.1


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_recording_changes_nothing_and_leaves_no_trace(studio, module, routed, sampler):
    """Also with a sampler that asks the model twice a step."""
    settings = {"sampler": sampler, "steps": 3, "cfg": 4.0}
    before = studio.draw(routed, **settings)
    recorder = record(studio, module, routed, sampler_name=sampler)
    assert len(recorder.steps) == 3
    drawn = studio.model.model.process_latent_out(recorder.steps[-1].latent)
    assert relate(drawn, before) < 1e-4
    for model in (routed, studio.model):
        assert WATCH not in model.model_options["transformer_options"]
    assert torch.equal(studio.draw(routed, **settings), before)


def test_frames_and_summary(draw_map, routed):
    drawn, summary, report = draw_map(routed, frames=2, batch=2)
    assert drawn.shape[0] == 2 and summary.shape[0] == 1 and drawn.shape[1:] == summary.shape[1:]
    assert drawn.min() >= 0 and drawn.max() <= 1 and not torch.equal(drawn[0], drawn[1])
    assert (report["tokens"], report["layers"], report["steps"]) == (256, 5, 3)
    assert report["chosen"] > 0 and report["grid"] > 0 and 0 <= report["overlap_of_steps"] <= 1
    assert draw_map(routed, frames=100)[0].shape[0] == 3, "more frames than steps"


def test_the_second_level_has_a_quarter_of_the_tokens(draw_map, routed):
    assert draw_map(routed, level="second")[2]["tokens"] == 64


def test_a_training_free_model_shows_its_grid_alone(studio, draw_map):
    report = draw_map(studio.apply(levels="finest"))[2]
    assert report["chosen"] == 0 and report["grid"] > 0 and report["ever_answered"] > report["grid"] / 256


def test_keys_that_grow_in_number_are_said(studio, draw_map, student):
    """With a router, which rests in the second half of `quality`, and without a student."""
    trained, free = (
        draw_map(studio.apply(student=each, levels="finest", preset="quality"), steps=6)[2] for each in (student, None)
    )
    assert (free["grid"], free["later_grid"], free["chosen"], free["later_chosen"]) == (32, 64, 0, 0)
    assert trained["grid"] + trained["chosen"] == 32 > trained["grid"] and trained["chosen"] > 0
    assert (trained["later_grid"], trained["later_chosen"]) == (64, 0)


def confine(studio, prompt):
    """A prompt for the upper left part of the picture."""
    area = {"width": 64, "height": 48, "x": 0, "y": 0, "strength": 1.0}
    return studio.call("ConditioningSetArea", conditioning=prompt, **area)


@pytest.mark.parametrize("level", [0, 1])
def test_of_prompts_for_parts_of_the_picture_that_for_all_of_it_is_shown(studio, module, routed, level):
    """Also at a size that has no whole half."""
    part = confine(studio, studio.positive)
    both = studio.call("ConditioningCombine", conditioning_1=part, conditioning_2=studio.positive)
    settings = {"level": level, "cfg": 1.0, "steps": 1, "size": (17, 13)}
    alone, mixed = (record(studio, module, routed, positive=each, **settings) for each in (studio.positive, both))
    assert mixed.partial and not alone.partial
    assert torch.equal(mixed.steps[0].kept, alone.steps[0].kept)


def test_prompts_for_parts_of_the_picture_alone_are_explained(studio, draw_map, routed):
    with pytest.raises(ValueError, match="parts of the picture alone.*Conditioning"):
        draw_map(routed, positive=confine(studio, studio.positive))


def test_a_model_without_dha_is_explained(studio, draw_map):
    with pytest.raises(ValueError, match="Connect the model output of Apply DHA"):
        draw_map(studio.model)


def test_a_level_that_is_not_replaced_is_explained(studio, student, draw_map):
    with pytest.raises(ValueError, match="no layer at the level 'second'"):
        draw_map(studio.apply(student=student, levels="finest"), level="second")


def test_a_published_student_is_refused_before_anything_is_sampled(studio, draw_map, monkeypatch, module):
    monkeypatch.delattr(module, "record")
    published = studio.load_student("published-map", config=DHAConfig(mode="official", levels=(1,)))
    with pytest.raises(ValueError, match="a student of mode 'official'.*inside of their own attention"):
        draw_map(studio.apply(student=published), level="second")
