"""The kernel distance has no bias, its error is the spread over new draws, and it sees what is spoilt."""

import numpy as np
import pytest
import torch
from drawings import add_noise, draw_shapes, halve_resolution

from dkd_trainer.metrics import features, kernel_distance


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


def test_kernel_distance_on_real_features_sees_blur_and_noise(net):
    images = draw_shapes(48)
    reference, other = features.pool_features(net, images).chunk(2)
    blurred, noisy = (
        features.pool_features(net, z) for z in (halve_resolution(images[24:]), add_noise(images[24:], 10 / 255))
    )
    null, blur, noise = (kernel_distance.kernel_distance(reference, z) for z in (other, blurred, noisy))
    assert abs(null) < 0.2 * min(blur, noise)
