"""Bands, feature distances and published metrics: known values, and clear words where weights are missing."""

import sys

import pytest
import torch
from drawings import add_noise, draw_gradients

from dkd_trainer.metrics import bands, features, published


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


def test_real_features_are_those_of_the_network(net):
    images = draw_gradients(2)
    pooled = features.pool_features(net, images)
    assert pooled.shape == (2, 1280)
    head = features.grid_features(net, images, side=1)[:, 0, -1280:]
    torch.testing.assert_close(head, pooled, atol=1e-5, rtol=1e-4)
    assert [stage.shape[1:] for stage in features.stage_features(net, images)] == [
        (16, 80, 80), (24, 40, 40), (40, 20, 20), (112, 10, 10), (320, 5, 5)
    ]  # fmt: skip
