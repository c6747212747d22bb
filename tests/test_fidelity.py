"""PSNR and SSIM are what their definitions say."""

import numpy as np
import pytest
import torch
from drawings import add_noise, draw_gradients

from dha import fidelity


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
