"""Captions are taken apart and scored: the right one first, also on real pictures."""

import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawings import draw_gradients, halve_resolution
from safetensors.torch import save_file

from dkd_trainer.metrics import features, kernel_distance, prompt_score
from dkd_trainer.metrics.captions import PAIRS, Parts, list_distractors, parse_caption
from dkd_trainer.metrics.phrases import PhraseTable
from dkd_trainer.mini.data import load_emoji, plan_held_out, to_tensor
from dkd_trainer.mini.packages import ICON_SETS
from dkd_trainer.mini.scenes import BACKGROUNDS, KINDS, Scene, write_caption


def test_parse_reads_what_scenes_write():
    concepts = [SimpleNamespace(label=label, tags=()) for label in ("red apple", "bow and arrow")]
    for kind in KINDS:
        second = "bow and arrow" if kind in PAIRS else ""
        caption = write_caption(Scene(kind, 0, 1, "glossy 3d", "sky blue"), concepts)
        assert parse_caption(caption, {"red apple", "bow and arrow"}) == (
            "red apple", second, kind, "glossy 3d", "sky blue"
        )  # fmt: skip
    caption = "checkerboard of bow and arrow and dango, noto style, pink background"
    assert parse_caption(caption, {"bow and arrow"})[:2] == ("bow and arrow", "dango")
    assert parse_caption("a photo of a street") == Parts("a photo of a street")


@pytest.mark.parametrize("kind, second", [("one", ""), ("mirrored", ""), ("left", "cat"), ("checkerboard", "cat")])
def test_distractors_are_distinct_wrong_and_always_the_same(kind, second):
    names, parts = [f"thing {i}" for i in range(150)], Parts("dog", second, kind, "noto", "pink")
    wrong = list_distractors(parts, names)
    flat = [parts for group in wrong.values() for parts in group]
    assert len(set(flat)) == 63 and parts not in flat
    assert wrong == list_distractors(parts, names)
    assert len(wrong["style"]) == len(wrong["background"]) == 7
    if second:
        assert Parts("cat", "dog", kind, "noto", "pink") in wrong["arrangement"]
        assert {sum(name in ("dog", "cat") for name in w[:2]) for w in wrong["objects"]} == {0, 1}
    with pytest.raises(ValueError, match="names of other objects"):
        list_distractors(parts, names[:10])


def make_scorer() -> prompt_score.PromptScorer:
    """An untrained scorer over invented names, which needs neither MiniLM nor EfficientNet."""
    torch.manual_seed(0)
    names = [f"thing {i}" for i in range(150)]
    phrases = ["", *names, *ICON_SETS, *BACKGROUNDS, *KINDS]
    vectors = torch.randn(len(phrases), 384)
    vectors[0] = 0
    # what the file keeps
    return prompt_score.PromptScorer(names, PhraseTable(phrases, vectors.half().float())).eval().requires_grad_(False)


def test_a_trained_scorer_ranks_the_true_caption_first_and_survives_its_file(tmp_path):
    scorer = make_scorer().requires_grad_(True)
    rng = random.Random(0)
    looks = [list(ICON_SETS), list(BACKGROUNDS)]
    parts = [Parts(*rng.sample(scorer.names, 2), rng.choice(PAIRS), *map(rng.choice, looks)) for _ in range(16)]
    rows = scorer.table.look_up(parts)
    grid = torch.randn(16, 9, 1792)
    torch.manual_seed(0)
    prompt_score.train_heads(scorer, grid, rows, rows, steps=30, batch=16)
    words = {"left": "{} left of {}", "above": "{} above {}", "checkerboard": "checkerboard of {} and {}"}
    captions = [f"{words[p.kind].format(p.first, p.second)}, {p.style} style, {p.background} background" for p in parts]
    prompt_score.calibrate(scorer, grid, captions)
    report = prompt_score.report_quality(scorer, grid.repeat(4, 1, 1), captions * 4)
    assert report["score, real pictures"] > 0.6 > 2 * report["score, shuffled captions"]
    right = scorer.match(grid, captions)
    assert (right.argmax(1) == torch.arange(16)).float().mean() > 0.9
    path = tmp_path / "scorer.safetensors"
    prompt_score.save_scorer(scorer, path)
    again = prompt_score.load_prompt_scorer(path)
    torch.testing.assert_close(again.compare(grid, captions)[0], scorer.compare(grid, captions)[0])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_scorer_refuses_what_does_not_belong_to_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="train one with"):
        prompt_score.load_prompt_scorer(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has format None"):
        prompt_score.load_prompt_scorer(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="found 2 pictures and 1 captions"):
        make_scorer().compare(torch.zeros(2, 9, 1792), ["thing 1, noto style, pink background"])


def test_score_depends_on_picture_and_caption(net):
    scorer = make_scorer()
    captions = ["thing 1 left of thing 2, noto style, pink background", "thing 3, flat style, green background"]
    scores = scorer.score(draw_gradients(2), captions)
    assert scores.shape == (2,)
    assert ((scores > 0) & (scores < 1)).all()
    assert (scores != scorer.score(draw_gradients(2, 1), captions)).all()
    assert (scores != scorer.score(draw_gradients(2), captions[::-1])).all()


@pytest.fixture(scope="module")
def work() -> Path:
    """Folder where the emoji art was rendered and a scorer trained."""
    folder = Path(os.environ.get("DKD_WORK", "none"))
    if not (folder / "emoji128.npy").exists() or not (folder / prompt_score.FILE).exists():
        pytest.skip("no emoji art or prompt scorer; train one and point DKD_WORK at the folder it was trained in")
    return folder


def test_real_pictures_show_their_captions_and_degrade_as_expected(net, work):
    emoji = load_emoji(work)
    scenes = plan_held_out(emoji, 96)
    images = to_tensor(np.stack([emoji.draw(scene) for scene in scenes]))
    captions = [emoji.caption(scene) for scene in scenes[:24]]
    scorer = prompt_score.load_prompt_scorer(work / prompt_score.FILE)
    # shuffled by seven: the kinds of scenes repeat every six, and the same kind is not all wrong
    right, blurred = scorer.score(images[:24], captions), scorer.score(halve_resolution(images[:24]), captions)
    assert right.mean() > 0.4 > 2 * scorer.score(images[:24], captions[7:] + captions[:7]).mean()
    assert blurred.mean() < right.mean()
    reference, other = features.pool_features(net, images).chunk(2)
    worse = features.pool_features(net, halve_resolution(images[48:]))
    null, blur = (kernel_distance.kernel_distance(reference, z) for z in (other, worse))
    assert abs(null) < 0.5 * blur


def test_aspects_of_a_free_caption_are_its_objects_alone():
    aspects = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]])
    chances = prompt_score.weigh_aspects(torch.zeros(2, 5), aspects, torch.ones(4)).exp()
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.5], [torch.nan, torch.nan, torch.nan, 0.2]])
    torch.testing.assert_close(chances, expected, equal_nan=True)
