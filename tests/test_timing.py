"""The warm-up of the nodes that time models, in a real ComfyUI: the steps that the timed runs begin and end with."""

import pytest
import torch

SCHEDULES = [
    ("euler", "normal"),
    ("euler", "simple"),
    ("euler", "sgm_uniform"),
    ("euler", "beta"),
    ("euler", "linear_quadratic"),
    ("dpm_2", "normal"),
    ("uni_pc", "normal"),
]


@pytest.fixture
def measure(studio, student, module):
    """Noise level, and stretch of the preset, of every forward of a model's warm-up and of a run after it."""

    def run(preset="quality", **changes):
        model = studio.apply(student=student, levels="two finest", preset=preset)
        seen = []

        def note(executor, x, timesteps, context, y=None, control=None, options=None, **kwargs):
            seen.append((options["sigmas"][0].item(), options["dha_stretch"]))
            return executor(x, timesteps, context, y, control, options, **kwargs)

        model.add_wrapper_with_key("diffusion_model", "test", note)
        conditions = {"positive": studio.positive, "negative": studio.negative}
        values = {"seed": 0, "steps": 10, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        sampling, latent = module("timing").Sampling(**{**values, **changes}, **conditions), torch.zeros(1, 4, 8, 8)
        with torch.inference_mode():
            module("timing").warm_up(sampling, model, {"samples": latent}, None)
            warmed = len(seen)
            sampling.run(model, {"samples": latent}, None)
        return seen[:warmed], seen[warmed:]

    return run


@pytest.mark.parametrize(("sampler", "scheduler"), SCHEDULES)
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_the_warm_up_has_the_first_and_the_last_step_of_the_schedule(measure, sampler, scheduler, denoise):
    warmed, timed = measure(sampler_name=sampler, scheduler=scheduler, denoise=denoise)
    assert len(warmed) < len(timed)
    assert (warmed[0], warmed[-1]) == (timed[0], timed[-1])


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_each_stretch_of_a_preset_is_warmed_up_and_the_exact_rest(measure, preset):
    warmed, timed = measure(preset, scheduler="normal", steps=20)
    assert [stretch for _, stretch in warmed] == [0, 1, None] == list(dict.fromkeys(stretch for _, stretch in timed))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "sa_solver", "deis"])
@pytest.mark.parametrize(("denoise", "steps"), [(0.2, 20), (1.0, 4), (0.05, 8)])
def test_no_level_is_warmed_up_twice(measure, sampler, denoise, steps):
    """Where a sampling begins behind the middle, too: multistep samplers divide by the way between levels."""
    warmed, timed = measure(denoise=denoise, scheduler="normal", steps=steps, sampler_name=sampler)
    levels = [level for level, _ in warmed]
    assert levels == sorted(set(levels), reverse=True) and len(levels) == 3 < len(timed)
    assert (warmed[0], warmed[-1]) == (timed[0], timed[-1]) and set(warmed) <= set(timed)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_schedule_of_no_more_than_three_steps_is_warmed_up_whole(measure, steps):
    warmed, timed = measure(steps=steps)
    assert warmed == timed and len(warmed) == steps
