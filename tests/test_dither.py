"""Grids that move from step to step: what they are made of, and that the errors of a sampling cancel."""

import sys

import pytest
import torch
from conftest import relate

from dha.config import DHAConfig
from dha.dither import PHASES, dithered_indices, find_phase, list_phases
from dha.patch import WATCH, make_patches, plain_attention
from dha.presets import Stretch
from dha.routing import plan_context
from dha.sites import SITES
from dha.student import Student
from dkd_trainer.diffusion import noise_levels, sample_euler, to_noise

FREE = DHAConfig(levels=(0,), token_budget=0.125)
STEPS = torch.linspace(999, 0, 26)[:-1].round().long()


@pytest.mark.parametrize("height,width,budget", [(16, 16, 0.125), (7, 9, 0.2), (33, 64, 0.02), (5, 40, 0.5)])
def test_every_grid_has_one_token_of_each_cell(height, width, budget):
    plan = plan_context(height, width, budget, 1.0, 4096, routed=False)
    grids = dithered_indices(plan, torch.arange(PHASES))
    rows, columns = grids // width // plan.strides[0], grids % width // plan.strides[1]
    cells = rows * plan.grid[1] + columns
    assert grids.shape == (PHASES, plan.coarse)
    assert torch.equal(cells, torch.arange(plan.coarse).expand_as(cells))


def test_each_token_has_its_turn_equally_often():
    plan = plan_context(16, 16, 0.125, 1.0, 4096, routed=False)
    whole = plan.height // plan.strides[0] * plan.strides[0] * plan.width  # cut cells have fewer tokens
    turns = torch.bincount(dithered_indices(plan, torch.arange(PHASES)).flatten(), minlength=plan.tokens)[:whole]
    even = PHASES / (plan.strides[0] * plan.strides[1])
    assert turns.view(-1, plan.width)[:, : plan.width // plan.strides[1] * plan.strides[1]].sub(even).abs().max() <= 1.5


def test_the_phase_is_the_first_samples_and_differs_from_step_to_step():
    levels = noise_levels(STEPS)
    phases = torch.cat([find_phase(level[None]) for level in levels])
    assert all(find_phase(torch.stack([level, levels[3]])).equal(find_phase(level[None])) for level in levels)
    assert ((phases >= 0) & (phases < PHASES)).all()
    assert (phases[1:] != phases[:-1]).float().mean() > 0.9 and len(phases.unique()) >= 15
    nearly = levels * (1 + 1e-7)  # another device's rounding
    assert torch.cat([find_phase(level[None]) for level in nearly]).eq(phases).float().mean() > 0.9


def test_layers_of_one_step_have_grids_of_their_own():
    phases = list_phases(find_phase(torch.tensor([3.0])), len(SITES))
    assert len(phases.unique()) == len(SITES)


def watch_grids(studio, sigmas, batch=1, **given):
    """Grids by block of one forward of the mini at a noise level."""
    student, unet = Student(FREE, studio.architecture), studio.model.model.diffusion_model
    grids = {}
    options = make_patches(student, plain_attention, **given).as_options()
    options[WATCH] = lambda site, plan, grid, chosen, opts: grids.__setitem__(site.block, grid.clone())
    if sigmas is not None:
        options["sigmas"] = torch.tensor([sigmas])
    context = torch.zeros(batch, 77, 128)
    with torch.inference_mode():
        unet(torch.zeros(batch, 4, 16, 16), torch.full((batch,), 500.0), context=context, transformer_options=options)
    return grids


def test_a_grid_moves_with_the_noise_level_and_is_the_same_for_prompt_and_no_prompt(studio):
    one, other, pair = watch_grids(studio, 2.0), watch_grids(studio, 1.7), watch_grids(studio, 2.0, batch=2)
    assert all(torch.equal(one[block], pair[block]) and not torch.equal(one[block], other[block]) for block in one)
    assert len({tuple(grid.tolist()) for grid in one.values()}) > 1


def test_without_a_noise_level_the_grid_stands_in_the_middle_of_its_cells(studio):
    grids = watch_grids(studio, None)
    assert len({tuple(grid.tolist()) for grid in grids.values()}) == 1


def test_the_errors_of_a_sampling_cancel(teacher):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 4, 16, 16, generator=generator)
    context = teacher.encode_prompts(["a photo of a cat", "a drawing of a frog", "a photo of a duck", "a flower"])

    def draw(*stretches, **given):
        student = Student(FREE, teacher.architecture)
        options = make_patches(student, plain_attention, stretches, **given).as_options() if stretches else {}

        def predict(x, t):
            return to_noise(teacher.predict(x, t, context, options), x, t, teacher.prediction)

        return sample_euler(predict, noise, 20)

    expected = draw()
    fixed = relate(draw(Stretch(0.125), phase_of=lambda options: None), expected)
    moving = relate(draw(Stretch(0.125)), expected)
    assert moving < 0.75 * fixed


@pytest.mark.parametrize("sampler,scheduler", [("euler", "normal"), ("dpmpp_2m", "karras"), ("heun", "normal")])
def test_they_cancel_in_the_host_with_its_own_samplers(studio, pack, monkeypatch, sampler, scheduler):
    model, settings = studio.apply(budget=0.25, levels="finest"), {"sampler": sampler, "scheduler": scheduler}
    expected = studio.draw(steps=16, **settings)
    moving = relate(studio.draw(model, steps=16, **settings), expected)
    patch = sys.modules[f"{pack.__name__}.dha.patch"]
    monkeypatch.setattr(patch, "find_phase", lambda levels: torch.zeros(1, dtype=torch.long))
    fixed = relate(studio.draw(model, steps=16, **settings), expected)
    assert moving < 0.8 * fixed


def test_forwards_of_a_step_share_their_grids_in_one_batch_or_in_two(studio, monkeypatch):
    """Guidance multiplies what differs between prompt and no prompt."""
    import comfy.samplers

    model = studio.apply(budget=0.25, levels="finest")
    together = studio.draw(model, steps=3)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda first, second: first is second)
    assert relate(studio.draw(model, steps=3), together) < 1e-4


@pytest.mark.parametrize("height,width", [(16, 16), (7, 9), (33, 64), (12, 21)])
@pytest.mark.parametrize("budget", [0.05, 0.125, 0.3, 0.5])
def test_no_other_cells_of_that_shape_would_use_more_of_the_budget(height, width, budget):
    plan = plan_context(height, width, budget, 1.0, 4096, routed=False)
    most = round(budget * height * width)
    sides = [(a, b) for a in range(1, 20) for b in range(1, 20) if max(a, b) <= 2 * min(a, b)]
    counts = [-(-height // down) * -(-width // across) for down, across in sides]
    assert plan.strides in sides and plan.coarse == max(count for count in counts if count <= most)
