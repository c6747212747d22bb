"""The DCT is the one that everybody means, and each band keeps what FCDiffusion says it keeps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dha.frequency import BANDS, band_limits, dct2, dct_matrix, diagonals, filter_band, idct2, shuffle_diagonals

GOLDEN = Path(__file__).parent / "golden" / "dct_reference.safetensors"
SIZES = [(64, 64), (16, 16), (17, 11), (1, 5), (96, 64), (128, 128)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def draw(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_transform_equals_scipy(size, device):
    fft = pytest.importorskip("scipy.fft")
    z = draw(2, 4, *size, dtype=torch.float64, device=device)
    expected = torch.from_numpy(fft.dctn(z.cpu().numpy(), type=2, norm="ortho", axes=(-2, -1)))
    torch.testing.assert_close(dct2(z).cpu(), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(dct2(z.float()).cpu(), expected.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_inverse_undoes_the_transform_and_no_energy_is_lost(size, device):
    z = draw(3, 2, *size, device=device)
    torch.testing.assert_close(idct2(dct2(z)), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(dct2(z).square().sum(), z.square().sum(), rtol=1e-5, atol=0)


def test_any_number_of_leading_dimensions():
    z = draw(5, 7)
    torch.testing.assert_close(dct2(z.expand(2, 3, 5, 7)), dct2(z).expand(2, 3, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    z = draw(1, 4, 64, 64, dtype=dtype)
    assert torch.equal(dct2(z), dct2(z.float()).to(dtype))
    assert torch.equal(filter_band(z, "low"), filter_band(z.float(), "low").to(dtype))


def test_autocast_leaves_the_transforms_in_single():
    z = draw(1, 4, 64, 64)
    expected = dct2(z), idct2(z), filter_band(z, "high")
    with torch.autocast("cpu", torch.bfloat16):
        found = dct2(z), idct2(z), filter_band(z, "high")
    assert all(map(torch.equal, found, expected))


def test_published_transform_and_filters_are_reproduced():
    golden = load_file(GOLDEN)
    found, place = dct2(golden["z"]), diagonals(16, 16)
    torch.testing.assert_close(found, golden["dct2"], atol=1e-5, rtol=0)
    for name, kept in {"low": place <= 8, "mid": (place >= 5) & (place <= 12), "high": place >= 14}.items():
        torch.testing.assert_close(idct2(found * kept), golden[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("band", "first", "last"), [("mini", 0, 10), ("low", 0, 30), ("mid", 20, 40), ("high", 50, 126)]
)
def test_literal_thresholds_at_64_by_64(band, first, last):
    assert torch.equal(dct2(filter_band(torch.zeros(1, 1, 64, 64), band)), torch.zeros(1, 1, 64, 64))
    kept = dct2(filter_band(idct2(torch.ones(1, 1, 64, 64)), band))[0, 0]
    for row in range(64):
        for column in range(64):
            assert kept[row, column].item() == pytest.approx(float(first <= row + column <= last), abs=1e-4)


def test_thresholds_follow_the_size_unless_they_are_to_be_literal():
    assert band_limits("mid", 96, 64) == (25.0, 50.0)
    assert band_limits("mid", 96, 64, scaled=False) == (20, 40)
    assert band_limits("high", 16, 16) == (12.5, float("inf"))
    kept = dct2(filter_band(idct2(torch.ones(1, 1, 16, 16)), "high"))[0, 0]
    torch.testing.assert_close(kept, (diagonals(16, 16) >= 13).float(), atol=1e-4, rtol=0)
    kept = dct2(filter_band(idct2(torch.ones(1, 1, 16, 16)), "low", scaled=False))[0, 0]
    torch.testing.assert_close(kept, torch.ones(16, 16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (9, 4)], ids=str)
def test_mini_pass_permutes_within_each_diagonal_alike_for_all_channels_and_samples(size):
    place = diagonals(*size)
    labels = torch.arange(size[0] * size[1], dtype=torch.float64).view(size)
    z = idct2(labels.expand(2, 4, *size))
    kept = dct2(filter_band(z, "mini", seed=3))
    assert (kept - kept[:1, :1]).abs().max() < 1e-6
    last = int(band_limits("mini", *size)[1])
    for total in range(last + 1):
        mine, theirs = kept[0, 0][place == total].round().sort().values, labels[place == total].sort().values
        assert torch.equal(mine, theirs)
    assert kept[0, 0][place > last].abs().max() < 1e-6


def test_mini_pass_follows_its_own_seed_and_nothing_else():
    z = draw(1, 4, 64, 64)
    torch.manual_seed(0)
    first = filter_band(z, "mini", seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(filter_band(z, "mini", seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(filter_band(z, "mini", seed=2), first)
    assert torch.equal(filter_band(z, "low", seed=1), filter_band(z, "low", seed=2))


def test_a_shuffle_is_a_permutation_even_where_the_band_is_wider_than_the_picture():
    for size in [(3, 9), (1, 1), (64, 64)]:
        order = shuffle_diagonals(*size, last=1000, seed=0)
        assert torch.equal(order.sort().values, torch.arange(size[0] * size[1]))


def test_gradients_flow_through_a_matrix_first_made_in_inference_mode():
    dct_matrix.cache_clear()
    with torch.inference_mode():
        dct2(torch.zeros(1, 1, 8, 8))
    z = draw(1, 1, 8, 8).requires_grad_()
    filter_band(z, "low").square().sum().backward()
    assert z.grad.abs().sum() > 0


def test_an_unknown_band_is_refused_by_name():
    with pytest.raises(ValueError, match="'medium'.*mini, low, mid, high"):
        filter_band(torch.zeros(1, 4, 8, 8), "medium")
    assert list(BANDS) == ["mini", "low", "mid", "high"]
