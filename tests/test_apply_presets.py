"""Presets of Apply DHA in a real ComfyUI: what they stand for, where they end, graphs without one, and memory."""

import logging
import sys

import pytest
import torch
from conftest import relate

from dha.patch import WATCH
from dha.peak import LiveTensors

PRESETS = [("quality", 0.125), ("balanced", 0.0625), ("fast", 0.03125)]


def apply_preset(studio, student, preset, start=0.0, end=1.0):
    return studio.apply(student=student, budget=0.3, start=start, end=end, preset=preset)


def list_keys(studio, model, **settings):
    """Keys at the finest level in each step of a sampling in which some layer of it is shortened, and its samples."""
    steps = {}

    def watch(site, plan, _grid, _chosen, options):
        if site.level == 0:
            steps[options["sigmas"][0].item()] = plan.coarse + plan.chosen

    watched = model.clone()
    watched.model_options["transformer_options"][WATCH] = watch
    samples = studio.draw(watched, **settings)
    return list(steps.values()), samples


@pytest.mark.parametrize(("preset", "budget"), PRESETS)
def test_preset_takes_the_place_of_the_budget_and_has_an_end_of_its_own(studio, student, preset, budget):
    """In steps at timesteps 999, 955.6, ..., 43.4, 0: twelve are of the first half, the last two are exact."""
    keys, samples = list_keys(studio, apply_preset(studio, student, preset), steps=24)
    assert keys == [round(256 * budget)] * 12 + [round(512 * budget)] * 10
    assert relate(samples, studio.draw(steps=24)) > 0


def test_trained_parts_rest_where_a_preset_has_many_keys(studio, student):
    """In the second half `quality` is as without a student, `balanced` is not."""
    late = {"steps": 6, "denoise": 0.4}
    for preset, same in (("quality", True), ("balanced", False)):
        trained, free = (studio.draw(apply_preset(studio, one, preset), **late) for one in (student, None))
        assert torch.equal(trained, free) is same
        assert relate(trained, studio.draw(**late)) > 0


def test_an_earlier_end_or_a_later_start_than_the_presets_counts(studio, student, caplog):
    earlier = apply_preset(studio, student, "balanced", end=0.5)
    own = studio.apply(student=student, budget=0.0625, end=0.5)
    assert torch.equal(studio.draw(earlier, steps=4), studio.draw(own, steps=4))
    assert "preset's own end" not in caplog.text
    assert apply_preset(studio, student, "quality", start=0.95) is studio.model
    assert "start_percent 0.95 does not come before the preset's own end" in caplog.text


@pytest.mark.parametrize(("start", "end", "counts"), [(0.7, 1.0, (0, 5)), (0.0, 0.7, (12, 5)), (0.3, 0.6, (5, 2))])
def test_a_window_cuts_a_presets_stretches(studio, student, start, end, counts):
    """Steps of 24 as above that lie in the first half and in the second."""
    keys, _ = list_keys(studio, apply_preset(studio, student, "balanced", start, end), steps=24)
    assert keys == [16] * counts[0] + [32] * counts[1]


@pytest.mark.parametrize(("side", "budget", "keys"), [(96, 0.5, {4608}), (72, 1.0, set())])
def test_a_share_of_the_tokens_has_no_cap(studio, side, budget, keys):
    """At more than 4096 tokens, too; with all of them the layer is left alone."""
    model, found = studio.apply(levels="finest", budget=budget), set()
    model.model_options["transformer_options"][WATCH] = lambda _, plan, *__: found.add(plan.coarse + plan.chosen)
    studio.draw(model, size=(8 * side, 8 * side), steps=1, cfg=1.0)
    assert found == keys


def test_a_new_node_is_balanced_and_a_graph_without_a_preset_gets_its_token_budget(studio, student):
    node = studio.host.nodes.NODE_CLASS_MAPPINGS["ApplyDHA"]
    inputs = node.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "levels", "token_budget", "start_percent", "end_percent"]
    assert list(inputs["optional"]) == ["student", "preset"]
    kind, options = inputs["optional"]["preset"]
    assert options["default"] == "balanced" and "balanced: 6.25 % of the tokens" in options["tooltip"]
    named = studio.apply(student=student, budget=0.3)
    assert torch.equal(studio.draw(named), studio.draw(apply_preset(studio, student, "custom")))


def test_a_picture_for_which_auto_knows_no_gain_is_said(studio, student, pack, monkeypatch, caplog):
    payoff = sys.modules[f"{pack.__name__}.dha.payoff"]
    monkeypatch.setattr(payoff, "WIDTHS", tuple(studio.architecture.channels.values()))  # as if they were SD-2.1's
    caplog.set_level(logging.INFO)
    small = studio.draw(studio.apply(student=student))
    assert caplog.text.count("at 128x128 no layer is known to get faster") == 1
    studio.draw(studio.apply(budget=1.0))
    assert caplog.text.count("no layer is known") == 1, "where each token looks at all nothing was to be faster"
    assert torch.equal(small, studio.draw())
    caplog.clear()
    studio.draw(studio.apply(student=student, levels="finest"))
    studio.draw(studio.apply(student=student), size=(384, 384))
    assert "no layer" not in caplog.text


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("side", [256, 384])
def test_the_peak_of_memory_grows_by_no_more_than_the_students_own_size(studio, student, side, trained):
    own = trained * sum(weight.nbytes for weight in student.patcher.model.parameters())
    peaks = []
    for model in (studio.model, studio.apply(student=student if trained else None)):
        studio.draw(model, size=(side, side), steps=1)
        with LiveTensors() as live:
            studio.draw(model, size=(side, side), steps=1)
        peaks.append(live.highest)
    phases = 16 * 8  # where the grids of 16 layers stand, bytes
    assert peaks[1] <= peaks[0] + own + phases
