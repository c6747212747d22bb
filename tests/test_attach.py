"""A student by torch's hooks, as hosts without ComfyUI's patches need it: in ComfyUI's own UNet, its patches left out.

The WebUI script is run against a stand-in of the few names that it asks for; in a real WebUI it was never tried.
"""

import copy
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAINED, make_student, relate

from dha import payoff
from dha.attach import attach
from dha.config import DHAConfig
from dha.patch import make_patches, plain_attention
from dha.presets import PRESETS, Preset, Stretch
from dha.student import FREE_CONFIG, Student

SPENDING = Preset((Stretch(token_budget=0.3, max_tokens=64),))
OFFICIAL = DHAConfig(mode="official", levels=(0, 1), norm_groups=4)
SCRIPT = ROOT / "scripts" / "dynamic_hybrid_attention.py"


@pytest.fixture
def unet(studio):
    return studio.model.model.diffusion_model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(6)
    x, context = torch.randn(2, 4, 11, 17, generator=generator), torch.randn(2, 77, 128, generator=generator)
    return {"x": x, "timesteps": torch.tensor([900.0, 100.0]), "context": context}


def predict(unet, inputs, options=None):
    with torch.inference_mode():
        return unet(**inputs, transformer_options=options or {})


def make_published(unet, studio):
    """A student of mode `official`, with heads as wide as the UNet's."""
    layer = unet.input_blocks[1][1].transformer_blocks[0].attn1
    student = Student(OFFICIAL, studio.architecture, head_width=len(layer.to_q.weight) // layer.heads)
    for tensor in student.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    return student


def describe_modules(unet):
    """Everything that hooks and attributes can change, in a form that compares."""
    return [
        (name, dict(module._forward_hooks), dict(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in unet.named_modules()
    ]


def test_hooks_compute_what_the_patches_do(studio, unet, inputs):
    student = make_student(studio.architecture)
    plain = predict(unet, inputs)
    patches = make_patches(student, plain_attention, SPENDING.stretches)
    expected = predict(unet, inputs, patches.as_options() | {"sigmas": inputs["timesteps"]})  # the grids' phase
    take_off = attach(unet, student, SPENDING)
    found = predict(unet, inputs)
    take_off()
    assert relate(found, expected) < 1e-5 < 1e-3 < relate(plain, expected)


@pytest.mark.parametrize("config", [TRAINED, OFFICIAL], ids=lambda config: config.mode)
def test_nothing_is_left_once_it_is_taken_off(studio, unet, inputs, config):
    student = make_student(studio.architecture, config=config) if config is TRAINED else make_published(unet, studio)
    plain, before = predict(unet, inputs), describe_modules(unet)
    groups = unet.input_blocks[1][1].norm.num_groups
    take_off = attach(unet, student, SPENDING)
    assert relate(predict(unet, inputs), plain) > 1e-3
    assert (unet.input_blocks[1][1].norm.num_groups == groups) == (config is TRAINED)
    take_off()
    assert describe_modules(unet) == before and unet.input_blocks[1][1].norm.num_groups == groups
    assert torch.equal(predict(unet, inputs), plain)


def test_a_context_of_somebody_else_is_left_to_the_layer(studio, unet, inputs):
    """Reference-style extensions give self-attention more keys; merged tokens come without their picture's shape."""
    layer = unet.input_blocks[1][1].transformer_blocks[0].attn1
    seen = []

    def widen(module, args, kwargs):
        x = args[0]
        seen.append(torch.cat([x, x], dim=1))
        return (x, seen[-1]), {}

    with torch.inference_mode():
        tokens = torch.randn(2, 187, layer.to_q.weight.shape[1], generator=torch.Generator().manual_seed(1))
        take_off = attach(unet, make_student(studio.architecture), SPENDING)
        hook = layer.register_forward_pre_hook(widen, with_kwargs=True)
        predict(unet, inputs)
        hook.remove()
        ours, wide, merged = layer(tokens), layer(tokens, torch.cat([tokens, tokens], 1)), layer(tokens[:, :100])
        take_off()
        plain, cut = layer(tokens), layer(tokens[:, :100])
    assert seen and relate(ours, plain) > 1e-3
    assert relate(wide, plain) < 1e-5  # twice the same keys weigh the same
    assert torch.equal(merged, cut)


def test_a_wrapper_that_stays_on_top_gets_the_layer_itself(studio, unet, inputs):
    plain = predict(unet, inputs)
    layer = unet.input_blocks[1][1].transformer_blocks[0].attn1
    take_off = attach(unet, make_student(studio.architecture), SPENDING)
    ours = layer.forward
    vars(layer)["forward"] = lambda *args, **kwargs: ours(*args, **kwargs)
    try:
        take_off()
        assert torch.equal(predict(unet, inputs), plain)
    finally:
        del vars(layer)["forward"]


def test_half_precision_of_an_autocast_is_followed(studio, unet, inputs):
    student = make_student(studio.architecture)
    take_off = attach(unet, student, SPENDING)
    exact = predict(unet, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(unet, inputs)
    take_off()
    assert next(student.parameters()).dtype == torch.bfloat16
    assert relate(found.float(), exact) < 0.1


@pytest.mark.parametrize(("t", "shortened"), [(600.0, True), (60.0, True), (40.0, False)])
def test_a_preset_leaves_the_last_steps_to_the_model(studio, unet, inputs, t, shortened):
    """Quality ends at 95 %, timestep 49.95; whether timesteps come by name or by place."""
    inputs = inputs | {"timesteps": torch.full((2,), t)}
    plain = predict(unet, inputs)
    take_off = attach(unet, make_student(studio.architecture), PRESETS["quality"])
    found = predict(unet, inputs)
    with torch.inference_mode():
        by_place = unet(inputs["x"], inputs["timesteps"], inputs["context"])
    take_off()
    assert torch.equal(found, by_place) and torch.equal(found, plain) != shortened


def test_trained_parts_rest_in_the_second_half(studio, unet, inputs):
    """From timestep 499.5 on, where `quality` has a quarter of the tokens."""
    inputs = inputs | {"x": torch.randn(2, 4, 16, 16)}
    for t, same in ((500.0, False), (499.0, True)):
        inputs["timesteps"] = torch.full((2,), t)
        found = []
        for student in (make_student(studio.architecture), Student(FREE_CONFIG, studio.architecture)):
            take_off = attach(unet, student, PRESETS["quality"])
            found.append(predict(unet, inputs))
            take_off()
        assert torch.equal(*found) is same


def test_a_published_student_runs_to_the_end_whatever_the_preset(studio, unet, inputs):
    inputs = inputs | {"timesteps": torch.full((2,), 10.0)}
    plain, student = predict(unet, inputs), make_published(unet, studio)
    take_off = attach(unet, student, PRESETS["quality"])
    found = predict(unet, inputs)
    take_off()
    assert relate(found, plain) > 1e-3


class Control:
    """Stands in for gradio's elements: keeps what it was made with."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def script(studio, tmp_path, monkeypatch):
    """The WebUI script, loaded as a WebUI does, with the repository on the path for just that long."""
    studio.write_student("webui")
    folder = tmp_path / "dha"
    folder.mkdir()
    (folder / "webui.safetensors").write_bytes((studio.base / "models" / "dha" / "webui.safetensors").read_bytes())
    modules, paths, scripts = (ModuleType(name) for name in ("modules", "modules.paths", "modules.scripts"))
    paths.models_path, scripts.Script, scripts.AlwaysVisible = str(tmp_path), object, object()
    modules.paths, modules.scripts = paths, scripts
    modules.devices = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    gradio = SimpleNamespace(Accordion=Control, Checkbox=Control, Dropdown=Control)
    for name, module in {"modules": modules, "modules.paths": paths, "gradio": gradio}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    spec = importlib.util.spec_from_file_location("dynamic_hybrid_attention", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.DynamicHybridAttention()


class Picture:
    """Stands in for a WebUI's processing of one batch with AUTOMATIC1111's model, or with Forge's."""

    def __init__(self, unet, forge: bool = False):
        model = SimpleNamespace(diffusion_model=unet)
        patcher = SimpleNamespace(unet=SimpleNamespace(model=model))
        self.sd_model = SimpleNamespace(forge_objects=patcher) if forge else SimpleNamespace(model=model)
        self.extra_generation_params, self.comments = {}, []
        self.comment = self.comments.append


@pytest.mark.parametrize("forge", [False, True], ids=["webui", "forge"])
def test_the_script_serves_one_batch_and_leaves(script, unet, inputs, forge):
    picture, plain = Picture(unet, forge), predict(unet, inputs)
    for student in script.ui(False)[2].args[0]:
        script.process(picture, True, "fast", student)
        script.process_batch(picture, True, "fast", student, batch_number=0)
        assert relate(predict(unet, inputs), plain) > 1e-3
        script.postprocess_batch(picture, True, "fast", student, images=None)
        assert torch.equal(predict(unet, inputs), plain)
        assert student in picture.extra_generation_params["Dynamic Hybrid Attention"]
    script.process_batch(picture, False, "fast", student)
    assert torch.equal(predict(unet, inputs), plain)


def test_a_picture_that_would_get_no_faster_stays_as_it_is(script, studio, unet, inputs, monkeypatch):
    """Were the mini's widths among those that are held back, as the real model's are."""
    monkeypatch.setattr(payoff, "WIDTHS", tuple(studio.architecture.channels.values()))
    picture, plain = Picture(unet), predict(unet, inputs)
    script.process_batch(picture, True, "fast", "webui.safetensors")
    assert torch.equal(predict(unet, inputs), plain) and script.attached
    script.postprocess_batch(picture, True, "fast", "webui.safetensors", images=None)


def test_the_other_tab_takes_off_what_a_failed_picture_left(script, unet, inputs):
    picture, plain = Picture(unet), predict(unet, inputs)
    script.process_batch(picture, True, "balanced", "webui.safetensors")
    type(script)().process(picture, False, "balanced", "webui.safetensors")
    assert torch.equal(predict(unet, inputs), plain)


def test_a_picture_of_another_model_is_drawn_without_and_says_why(script, unet):
    other = copy.deepcopy(unet.input_blocks[1])
    picture = Picture(other)
    script.process_batch(picture, True, "balanced", "webui.safetensors")
    assert "Stable Diffusion 2" in picture.comments[0] and not script.attached


def test_the_script_offers_the_presets_of_the_nodes(script):
    _, preset, student = script.ui(False)
    assert preset.args[0] == list(PRESETS) and preset.kwargs["value"] in PRESETS
    assert student.args[0][1:] == ["webui.safetensors"]
