"""`control evaluate` on the real mini teacher: what it measures, what it asks for, what it keeps and writes."""

import json

import numpy as np
import pytest
import torch
from conftest import make_student, relate
from control_files import write_control
from PIL import Image

from dha.control_file import load_control
from dha.frequency import BANDS, filter_band
from dkd_trainer.metrics.bands import band_fidelity

CAPTIONS = (
    "koala, flat style, pink background",
    "owl left of fox, noto style, white background",
    "two mirrored tulip, blob style, black background",
    "checkerboard of cat and rose, twitter style, green background",
)


@pytest.fixture(scope="module")
def branch(studio, teacher):
    from dkd_trainer.control.steering import FrozenBranch

    path = write_control(studio, "evaluated-low")
    return FrozenBranch(path.name, load_control(path), teacher)


@pytest.fixture(scope="module")
def sources():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Four small pictures with captions of emoji scenes."""
    folder, rng = tmp_path_factory.mktemp("held-out"), np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        grid = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(grid).resize((64, 64), Image.NEAREST).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture
def arguments(studio, pairs, tmp_path):
    control = write_control(studio, "evaluated-high", "high")
    return [
        *("--teacher", str(studio.checkpoint), "--held-out", str(pairs), "--out", str(tmp_path), "--device", "cpu"),
        *("--size", "64", "--count", "4", "--steps", "2", "--rounds", "0", "--strengths", "1"),
        *("--controls", str(control)),
    ]


def predict(teacher, sources, options):
    context = torch.randn(len(sources), 77, teacher.architecture.context, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return teacher.predict(sources, torch.full((len(sources),), 500), context, options)


def test_strength_0_is_the_uncontrolled_model_to_the_bit(teacher, branch, sources):
    from dkd_trainer.control.variant import is_uncontrolled

    context = torch.randn(2, 77, teacher.architecture.context)
    assert is_uncontrolled(teacher, branch, sources, context)
    free, steered = (predict(teacher, sources, o) for o in ({}, branch.as_options(teacher, sources, 1e-3)))
    assert not torch.equal(free, steered)


def test_a_frozen_branch_steers_as_the_trained_one_whose_file_it_is(teacher, branch, sources):
    from dkd_trainer.control.branch import TrainedBranch

    trained = TrainedBranch(teacher, branch.control.config)
    for name, tensor in branch.control.weights.items():
        trained.weights[name.replace(".", "/")].data.copy_(tensor)
    expected = predict(teacher, sources, trained.as_options(filter_band(sources, "low")))
    found = predict(teacher, sources, branch.as_options(teacher, sources))
    assert relate(found, expected) < 1e-5 < relate(predict(teacher, sources, {}), expected)


def test_student_and_control_both_take_part(teacher, branch, sources):
    from dkd_trainer.control.variant import Variant

    student = make_student(teacher.architecture)
    drawn = [
        predict(teacher, sources, variant.on(sources).build(teacher, 16))
        for variant in (
            Variant("teacher"),
            Variant("student", student),
            Variant("steered", branch=branch, strength=1.0),
            Variant("both", student, branch, 1.0),
            Variant("both, branch too", student, branch, 1.0, inside=True),
        )
    ]
    alike = [(i, j) for i, a in enumerate(drawn) for j, b in enumerate(drawn[:i]) if relate(a, b) < 1e-4]
    assert not alike


def test_fidelity_is_one_in_the_bands_that_two_latents_share(sources):
    torch.testing.assert_close(band_fidelity(sources, sources), torch.ones(2, len(BANDS)))
    mini, low, mid, high = band_fidelity(sources - 2 * filter_band(sources, "high"), sources).unbind(1)
    for found, expected in ((mini, 1.0), (low, 1.0), (mid, 1.0), (high, -1.0)):
        torch.testing.assert_close(found, torch.full((2,), expected))


def test_fidelity_in_the_mini_band_does_not_ask_for_its_order(sources):
    shuffled = filter_band(sources, "mini", seed=5)
    mini, low, *_ = band_fidelity(shuffled, filter_band(sources, "mini", seed=6)).unbind(1)
    assert mini.min() > 0.999 and low.max() < 0.99


def test_structure_is_what_a_picture_keeps_when_its_colours_change():
    features = pytest.importorskip("dkd_trainer.metrics.features", reason="torch alone")
    pytest.importorskip("efficientnet_lite_pytorch", reason="picture features come with the extra `train`")
    from dkd_trainer.metrics.structure import structure_distance

    net, picture = features.load_feature_net(), torch.full((1, 3, 128, 128), 0.8)
    picture[:, :, 16:64, 16:64] = 0.1
    recoloured = picture * torch.tensor([1.0, 0.7, 0.5]).view(1, 3, 1, 1)
    moved = picture.roll((48, 48), (2, 3))
    same, other, away = (structure_distance(net, p, picture).item() for p in (picture, recoloured, moved))
    assert same == pytest.approx(0, abs=1e-9) and 0 < other < 0.5 * away


@pytest.mark.parametrize(
    ("band", "changed"), [("low", {"first", "second"}), ("mid", {"background"}), ("high", {"style"})]
)
def test_a_changed_prompt_differs_in_what_the_band_leaves_free_and_in_nothing_else(band, changed):
    from dkd_trainer.control.tasks import change_prompts
    from dkd_trainer.metrics.captions import parse_caption

    task = change_prompts(band, CAPTIONS)
    assert task.prompts == task.captions == change_prompts(band, CAPTIONS).prompts
    for before, after in zip(map(parse_caption, CAPTIONS), map(parse_caption, task.captions), strict=True):
        differing = {name for name in before._fields if getattr(before, name) != getattr(after, name)}
        assert differing == changed - ({"second"} if not before.second else set())


def test_the_mini_bands_prompt_leaves_the_background_to_the_source():
    from dkd_trainer.control.tasks import change_prompts

    task = change_prompts("mini", CAPTIONS)
    for source, prompt, caption in zip(CAPTIONS, task.prompts, task.captions, strict=True):
        assert "background" not in prompt and caption == f"{prompt}, {source.rpartition(', ')[2]}"


def test_prompts_that_are_no_emoji_scenes_have_to_be_given(tmp_path):
    from dkd_trainer.control.evaluate import read_changes, read_size
    from dkd_trainer.control.tasks import change_prompts, read_prompts

    with pytest.raises(ValueError, match="'a dog on a beach' is no caption.*--changed high=FILE"):
        change_prompts("high", ["a dog on a beach"])
    (tmp_path / "high.txt").write_text("a dog, oil painting\n\na cat, oil painting\n")
    lines = read_changes([f"high={tmp_path / 'high.txt'}"])["high"]
    assert read_prompts("high", lines, 2).prompts == ["a dog, oil painting", "a cat, oil painting"]
    with pytest.raises(ValueError, match="found 2 prompts, expected one for each of 3"):
        read_prompts("high", lines, 3)
    with pytest.raises(ValueError, match="expected BAND=FILE"):
        read_changes(["hihg=file.txt"])
    with pytest.raises(ValueError, match="multiples of 8"):
        read_size("100x128")


def test_two_controls_of_one_band_are_refused(studio, teacher):
    from dkd_trainer.control.steering import read_branches

    files = [write_control(studio, f"twin-{number}", "mid") for number in range(2)]
    with pytest.raises(ValueError, match="twin-0.safetensors and twin-1.safetensors are both of band mid"):
        read_branches(files, teacher)


def test_the_command_measures_teacher_and_student_and_goes_on_where_it_stopped(
    studio, arguments, tmp_path, monkeypatch
):
    pytest.importorskip("efficientnet_lite_pytorch", reason="picture features come with the extra `train`")
    from dkd_trainer.control import evaluate

    more = ["--students", str(studio.write_student("steered")), "--more-sizes", "96x64", "--more-count", "2"]
    args = evaluate.read_arguments([*arguments, *more, "--picks", "1", "0"])
    files = {path.name for path in evaluate.evaluate(args)}
    sheets = {f"control-high-{size}.jpg" for size in ("64x64", "96x64")}
    assert files == {"control.json", "control.md", "control.jpg", *sheets}
    found = json.loads((tmp_path / "control.json").read_text())
    assert found["settings"]["strength_0_is_uncontrolled"] == {"high": True}
    assert [(r["task"], r["size"]) for r in found["results"]] == [
        ("own prompt", "64x64"),
        ("changed prompt", "64x64"),
        ("changed prompt", "96x64"),
    ]
    for rows in (result["rows"] for result in found["results"]):
        assert list(rows) == [f"{m}, {s}" for m in ("teacher", "steered") for s in ("no control", "strength 1")]
        assert rows["teacher, no control"]["fidelity_high"] != rows["teacher, strength 1"]["fidelity_high"]
        assert rows["steered, strength 1"]["perceptual"] >= 0 and "perceptual" not in rows["teacher, strength 1"]
        assert "band_change" in rows["steered, strength 1"] and "band_change" not in rows["steered, no control"]
    text = (tmp_path / "control.md").read_text()
    assert "those with the numbers 1, 0 (from 0), picked by --picks](control.jpg)" in text
    assert f"steered.safetensors {found['settings']['students']['steered.safetensors']}" in text
    monkeypatch.setattr(evaluate, "measure_variant", lambda *_: pytest.fail("measured again"))
    evaluate.evaluate(args)
    assert (tmp_path / "control.md").read_text() == text


def test_memory_is_that_of_the_step_and_of_the_added_weights(teacher, branch):
    from dkd_trainer.control.variant import Variant, measure_memory

    steered = Variant("steered", branch=branch, strength=1.0)
    found = measure_memory(teacher, [Variant("teacher"), steered], 64, 1)
    assert found["teacher"]["weight_bytes"] == 0
    assert found["steered"]["weight_bytes"] == sum(p.nbytes for p in branch.branch.parameters())
    assert 0 < found["teacher"]["peak_bytes"] < found["steered"]["peak_bytes"]
