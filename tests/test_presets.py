"""Presets and the table of layers that pay: what a name stands for, and when a layer stays as it is."""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from dha.config import DHAConfig
from dha.dither import dithered_indices
from dha.landmarks import place_landmarks
from dha.patch import make_patches, plain_attention
from dha.payoff import Payoff, choose_payoff
from dha.planner import Planner
from dha.presets import OWN, PRESETS, Preset, Stretch
from dha.routing import coarse_indices
from dha.sites import SITES, Architecture
from dha.student import Student

ROOT = Path(__file__).resolve().parent.parent
FULL_SIZE = Architecture({site.name: 320 << min(site.level, 2) for site in SITES}, 1280, 1024)
ROWS = [[320, 1024, 0.125, 0.9], [320, 4096, 0.125, 1.4], [320, 4096, 0.25, 1.01], [320, 16384, 0.25, 2.0]]
TABLE = {"device": "cpu", "dtype": "fp32", "rows": ROWS}


@pytest.fixture(scope="module")
def measured():
    """nodes/measured.py under the name of a pack: `nodes` itself needs a ComfyUI."""
    for name, folder in (("speed_pack", ROOT), ("speed_pack.nodes", ROOT / "nodes")):
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module("speed_pack.nodes.measured")


def spend_keys(stretch: Stretch, side: int) -> int:
    """Keys at the finest level of a square picture, training-free."""
    plan = Student(DHAConfig(), FULL_SIZE).plan(side // 8, side // 8, stretch)
    return plan.coarse + plan.chosen


def test_a_stretch_says_its_share_of_the_tokens_up_to_its_cap():
    stretch = Stretch(0.25, 100)
    assert stretch.find_share(200) == 0.25 and stretch.find_share(1000) == 0.1
    with pytest.raises(ValueError, match="to the student"):
        OWN.find_share(200)


def test_presets_spend_fewer_keys_in_the_order_of_their_names():
    for side in (512, 768, 1024, 2048):
        for number in (0, 1):
            spent = [spend_keys(PRESETS[name].stretches[number], side) for name in ("quality", "balanced", "fast")]
            assert spent == sorted(set(spent), reverse=True) and spent[-1] > 0


@pytest.mark.parametrize("name", PRESETS)
def test_above_1024_the_number_of_keys_stays_so_that_cost_grows_linearly(name):
    for stretch in PRESETS[name].stretches:
        keys = [spend_keys(stretch, side) for side in (1024, 2048, 4096)]
        assert all(0.8 * stretch.max_tokens <= count <= stretch.max_tokens for count in keys)


@pytest.mark.parametrize("name", PRESETS)
def test_the_second_half_of_a_presets_sampling_has_twice_the_keys(name):
    first, second = PRESETS[name].stretches
    assert first.end == 0.5 and second.token_budget == 2 * first.token_budget
    assert second.max_tokens == 2 * first.max_tokens
    assert first.trained and second.trained == (second.token_budget < 0.25)


def test_a_timestep_lies_in_the_stretch_that_has_not_ended_yet():
    preset = PRESETS["balanced"]
    found = [preset.find_stretch(timestep) for timestep in (999, 499.5, 499, 50, 49, 0)]
    assert found == [0, 0, 1, 1, None, None]
    assert Preset((Stretch(0.1),)).find_stretch(0) == 0


@pytest.mark.parametrize(
    ("tokens", "keys", "expected"),
    [
        (1024, 100, False),  # measured slower
        (2000, 200, False),  # nearest below is slower
        (4096, 512, True),
        (4096, 1000, False),  # within the noise
        (9216, 1100, True),
        (9216, 2000, False),
        (16384, 4096, True),
        (16384, 8192, False),  # a larger share than was ever measured
        (512, 10, False),  # smaller than all
    ],
)
def test_a_layer_that_was_measured_not_to_pay_stays_as_it_is(tokens, keys, expected):
    assert choose_payoff([TABLE], "cpu", "fp32").pays(tokens, 320, keys) is expected


def test_without_a_table_only_large_layers_are_shortened():
    for device, start in (("cuda", 9216), ("mps", 9216), ("cpu", 2304)):
        payoff = choose_payoff([] if device == "cpu" else [TABLE], device, "fp32")
        assert [payoff.pays(tokens, 320, 64) for tokens in (start - 1, start)] == [False, True]
    assert choose_payoff([TABLE], "cpu", "fp32").pays(4096, 640, 64), "no layer of this width was measured"


def test_widths_that_nobody_measures_are_not_held_back():
    assert Payoff().pays(64, 32, 8) and choose_payoff([TABLE], "cpu", "fp32").pays(64, 32, 60)


def test_the_table_of_the_same_precision_comes_first():
    other = {**TABLE, "dtype": "bf16", "rows": [[320, 1024, 0.5, 3.0]]}
    assert choose_payoff([TABLE, other], "cpu", "bf16").rows[0].speedup == 3.0
    assert choose_payoff([TABLE, other], "cpu", "fp16").rows[0].speedup == 0.9


def test_planner_asks_once_a_size_and_keeps_the_grids_and_landmarks():
    asked = []

    def pays(*size):
        asked.append(size)
        return size[0] > 100

    planner = Planner(Student(DHAConfig(token_budget=0.25, landmarks=64), FULL_SIZE), pays=pays)
    x, small = torch.randn(2, 256, 320), torch.randn(2, 64, 320)
    phase = torch.tensor([5])
    with torch.inference_mode():
        plan, (grid, marks) = planner.prepare(16, 16, x, phase)
    (kept,) = planner.places.values()
    assert torch.equal(marks, place_landmarks(16, 16, 64)) and not marks.is_inference()
    assert planner.prepare(16, 16, x, phase)[1].marks is marks
    assert torch.equal(grid, dithered_indices(plan, phase)[0]) and not kept.grids.is_inference()
    assert torch.equal(planner.prepare(16, 16, x, None)[1].grid, coarse_indices(plan, x.device))
    assert planner.prepare(8, 8, small, phase) is None is planner.prepare(8, 8, small, phase)
    assert asked == [(256, 320, 64), (64, 320, 16)]


def test_a_layer_that_does_not_pay_is_handed_back_untouched():
    student = Student(DHAConfig(levels=(0,)), FULL_SIZE)
    n, emb = torch.randn(1, 64, 320), torch.randn(1, 1280)
    for pays, length in ((lambda *_: False, 64), (lambda *_: True, 8)):
        patches = make_patches(student, plain_attention, pays=pays)
        options = {"block": ("input", 1), "activations_shape": [1, 320, 8, 8]} | patches.as_options()
        patches.emb(emb, 320, options)
        _, context, value = patches.attn1(n, n, n, options)
        assert context.shape[1] == value.shape[1] == length
        assert (context is n) == (length == 64)


def test_whether_a_layer_pays_is_decided_within_one_compiled_graph():
    """At SD-2.1's own widths, which alone are looked up in a table."""
    config = DHAConfig(levels=(0,), memory=4, rank=4, local=8, blend=True)
    student = Student(config, FULL_SIZE).start()
    n, emb = torch.randn(1, 4096, 320), torch.randn(1, 1280)
    patches = make_patches(student, plain_attention, pays=choose_payoff([TABLE], "cpu", "fp32").pays)

    def run(n, emb, level):
        options = {"block": ("input", 1), "activations_shape": [1, 320, 64, 64], "sigmas": level}
        options |= patches.as_options()
        patches.emb(emb, 320, options)
        return patches.attn1(n, n, n, options)

    with torch.no_grad():
        level = torch.tensor([2.0])
        found = torch.compile(run, backend="eager", fullgraph=True)(n, emb, level)
        assert all(torch.equal(*pair) for pair in zip(found, run(n, emb, level), strict=True))
    assert found[1].shape[1] == 512 + 4


def test_no_layer_asks_the_device_for_a_number():
    """Everything of a layer runs on `meta`, where nothing can be read back, in eager and with every trained part."""
    config = DHAConfig(levels=(0,), memory=4, rank=4, router_width=8, local=8, blend=True)
    with torch.device("meta"):
        student = Student(config, FULL_SIZE)
        n, emb = torch.randn(2, 256, 320), torch.randn(2, 1280)
    patches = make_patches(student, plain_attention)
    options = {"block": ("input", 1), "activations_shape": [2, 320, 16, 16], "n_heads": 5} | patches.as_options()
    with torch.inference_mode():
        patches.emb(emb, 320, options)
        out = patches.replace(*patches.attn1(n, n, n, options), options)
        assert patches.output(out, options).shape == n.shape


def test_figures_that_were_not_measured_are_left_out_of_the_tooltip(measured):
    nothing = measured.describe_presets({"presets": {}})
    assert [line.split(":")[0] for line in nothing.splitlines()] == list(PRESETS)
    assert "x" not in nothing.replace("most", "").replace("tokens", "") and "dB" not in nothing
    figures = {"fast": {"speed": {"1024": [2.344, 2.344]}, "psnr": 35.46}, "notes": ["On some machine."]}
    lines = measured.describe_presets({"presets": figures}).splitlines()
    assert lines[2].endswith("1024 2.20x; 35.5 dB") and lines[-1] == "On some machine." and len(lines) == 4


def test_a_presets_speed_in_the_tooltip_is_that_of_a_whole_sampling(measured):
    """Of twenty steps ten at four times the speed, nine at twice, one at the old: 20 / (10 / 4 + 9 / 2 + 1)."""
    preset = PRESETS["balanced"]
    assert preset.end == 0.95 and preset.relate_sampling([0.25, 0.5]) == pytest.approx(0.4)
    line = measured.describe_presets({"presets": {"balanced": {"speed": {"768": [4.0, 2.0]}}}}).splitlines()[1]
    said = "6.25 % of the tokens, 288 at most, from 50 % of the schedule on 12.5 %, 576, in the last 5 % all"
    assert said in line and line.endswith("768 2.50x")
    assert describe_one(measured) == "10 % of the tokens, 9 at most"


def describe_one(measured) -> str:
    return measured.describe_stretches(Preset((Stretch(0.1, 9),)))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "other"}'])
def test_a_missing_or_odd_file_of_figures_is_no_reason_to_fail(measured, tmp_path, content):
    file = tmp_path / "measured.json"
    if content is not None:
        file.write_text(content)
    found = measured.read_measured(file)
    assert found["layers"] == [] and choose_payoff(found["layers"], "cuda", "fp32") == Payoff()


def test_shipped_figures_are_well_formed(measured):
    if not measured.FILE.is_file():
        pytest.skip("no figures are shipped yet")
    found = json.loads(measured.FILE.read_text())
    assert found["format"] == measured.FORMAT and set(found["presets"]) <= {*PRESETS, "notes"}
    for table in found["layers"]:
        assert {"device", "dtype", "machine", "torch", "commit", "command"} <= set(table)
        assert choose_payoff([table], table["device"], table["dtype"]).rows
