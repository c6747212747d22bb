"""Landmarks: what a short context misses is carried from a few queries to all, on any kernel and at any size."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dha import landmarks
from dha.landmarks import (
    ROOT,
    carry_missed,
    count_landmarks,
    find_metric,
    place_landmarks,
    solve_carriers,
    solve_positive,
)
from dha.patch import plain_attention
from dha.routing import plan_context

HEADS, WIDTH = 2, 16
MARKS = place_landmarks(16, 16, 32)
attend = partial(plain_attention, options={"n_heads": HEADS}, mask=None)


class Count(TorchDispatchMode):
    """Operations that write a tensor of their own, and are not views of another."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "view" not in operation.__name__ and not operation.is_view:
            self.names.append(operation.__name__)
        return operation(*args, **(kwargs or {}))


class RoundProducts(TorchDispatchMode):
    """Matrix products of TF32: ten bits of a factor's mantissa, as a GPU takes them where somebody has allowed it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            *rest, first, second = args
            args = (
                *rest,
                *(((x.contiguous().view(torch.int32) + 4096) & ~8191).view(x.dtype) for x in (first, second)),
            )
        return operation(*args, **(kwargs or {}))


def draw_smooth(height: int, width: int, batch: int = 2) -> torch.Tensor:
    """Queries (B, N, C) as a picture has them: low frequencies and a little noise."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(batch, HEADS * WIDTH, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).flatten(2).transpose(1, 2).contiguous()


def measure_miss(count: int, keys: int = 32) -> float:
    """Relative error of attention to `keys` of 1,024 tokens with `count` landmarks."""
    x = draw_smooth(32, 32)
    picks = torch.randperm(1024, generator=torch.Generator().manual_seed(5))[:keys]
    exact = attend(x, x, x)
    short = x[:, picks]
    out = attend(x, short, short)
    if count:
        out = carry_missed(attend, x, x, x, [out], place_landmarks(32, 32, count), HEADS)[0]
    return ((out - exact).norm() / exact.norm()).item()


def test_landmarks_take_most_of_the_error_away_and_more_of_them_more():
    without, few, many = measure_miss(0), measure_miss(16), measure_miss(128)
    assert few < 0.8 * without and many < 0.25 * without


def test_at_a_landmark_the_answer_is_that_of_all_keys():
    x = draw_smooth(16, 16)
    exact, short = attend(x, x, x), attend(x, x[:, :20], x[:, :20])
    out = carry_missed(attend, x, x, x, [short.clone()], MARKS, HEADS)[0]
    left, before = ((y - exact)[:, MARKS].norm() for y in (out, short))
    assert left < 0.1 * before


def test_an_error_that_is_the_same_everywhere_goes_away_altogether():
    marks = draw_smooth(16, 16)[:, MARKS]
    missed = torch.ones_like(marks) * torch.linspace(-1, 1, HEADS * WIDTH)
    keys, values = solve_carriers(marks, marks, [missed], HEADS)
    elsewhere = attend(draw_smooth(16, 16), keys, values)
    torch.testing.assert_close(elsewhere, missed[:, :1].expand_as(elsewhere), atol=1e-5, rtol=1e-4)


def test_queries_that_were_merged_have_landmarks_of_their_own():
    x = draw_smooth(16, 16)
    merged = x.unflatten(1, (-1, 2)).mean(2)
    exact, short = attend(merged, x, x), attend(merged, x[:, :20], x[:, :20])
    out = carry_missed(attend, merged, x, x, [short.clone()], MARKS, HEADS)[0]
    assert (out - exact).norm() < 0.5 * (short - exact).norm()


@pytest.mark.parametrize("dtype,most", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_half_precision_carries_the_same(dtype, most):
    x = draw_smooth(16, 16)

    def run(x):
        return carry_missed(attend, x, x, x, [attend(x, x[:, :20], x[:, :20])], MARKS, HEADS)[0]

    exact, cast = run(x), run(x.to(dtype))
    assert cast.dtype == dtype
    assert (cast.float() - exact).norm() / exact.norm() < most


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 3.0])
def test_the_system_stays_solvable_in_rounded_products(size):
    x = draw_smooth(16, 16) * size
    exact, short = attend(x, x, x), attend(x, x[:, :20], x[:, :20])
    out = carry_missed(attend, x, x, x, [short.clone()], MARKS, HEADS)[0]
    with RoundProducts():
        rounded = carry_missed(attend, x, x, x, [short.clone()], MARKS, HEADS)[0]
    assert (rounded - out).norm() < 0.1 * (out - exact).norm()


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_queries_that_are_all_the_same_give_a_number(value):
    x = torch.full((1, 64, HEADS * WIDTH), value)
    out = carry_missed(attend, x, x, x, [attend(x, x[:, :8], x[:, :8])], place_landmarks(8, 8, 16), HEADS)[0]
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("height,width", [(64, 64), (96, 96), (128, 128), (104, 152), (45, 61), (16, 16), (256, 256)])
def test_landmarks_cover_the_picture_evenly(height, width):
    numbers = place_landmarks(height, width, 64)
    assert len(numbers.unique()) == 64
    places = torch.stack([numbers // width, numbers % width], 1).float()
    everywhere = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    farthest = torch.cdist(everywhere, places).min(1).values.max().item()
    assert farthest < 1.6 * (height * width / len(numbers)) ** 0.5  # 0.71 for a square grid, borders left out


@pytest.mark.parametrize("height,width", [(4, 16), (5, 37), (64, 4), (16, 16), (7, 7), (104, 152)])
def test_no_token_is_a_landmark_twice(height, width):
    count = min(height * width // 4, 160)
    numbers = place_landmarks(height, width, count)
    assert len(numbers.unique()) == count and numbers.min() >= 0 and numbers.max() < height * width


def test_there_are_none_where_they_would_be_most_of_the_tokens():
    assert plan_context(8, 8, 0.125, 1.0, 4096, False, landmarks=64).landmarks == 0
    assert plan_context(16, 16, 0.125, 1.0, 4096, False, landmarks=64).landmarks == 64
    assert plan_context(16, 16, 0.125, 1.0, 4096, False).landmarks == 0


@pytest.mark.parametrize(
    "side,keys,count",
    [
        (64, 64, 64),
        (64, 256, 64),
        (64, 384, 96),
        (128, 576, 128),
        (96, 288, 64),
        (32, 512, 128),
        (64, 2048, 160),
        (16, 192, 64),
    ],
)
def test_beside_many_keys_there_are_more_landmarks_up_to_a_limit(side, keys, count):
    plan = plan_context(side, side, keys / side**2, 1.0, 4096, False, landmarks=64)
    assert plan.landmarks == count_landmarks(64, keys, side**2) == count


@pytest.mark.parametrize("least,count", [(8, 8), (12, 12), (16, 32), (48, 96), (64, 160)])
def test_further_landmarks_are_a_multiple_of_32_whatever_was_said(least, count):
    assert count_landmarks(least, 2048, 4096) == count


def test_the_metric_is_the_root_of_the_keys_covariance():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.linspace(0.5, 2, WIDTH)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    keys = torch.randn(1, 4096, WIDTH, generator=generator) * lengths @ directions.T + 7
    root = directions @ torch.diag(lengths) @ directions.T
    metric = find_metric(keys - keys.mean(1, keepdim=True))[0]
    assert (metric / metric.norm() - root / root.norm()).norm() < 0.1


def test_keys_that_are_all_the_same_have_a_metric_and_gradients():
    spread = torch.zeros(2, 8, WIDTH, requires_grad=True)
    metric = find_metric(spread)
    metric.sum().backward()
    torch.testing.assert_close(metric.detach(), ROOT[0] * torch.eye(WIDTH).expand(2, -1, -1))
    assert spread.grad is not None and spread.grad.isfinite().all()


def test_queries_are_told_apart_by_what_keys_differ_in(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x = draw_smooth(16, 16)
    told = torch.arange(HEADS * WIDTH) % WIDTH < 4
    q, k = torch.where(told, x, torch.randn(x.shape, generator=generator)), x * told
    exact, short = attend(q, k, x), attend(q, k[:, :20], x[:, :20])

    def measure() -> float:
        return (carry_missed(attend, q, k, x, [short.clone()], MARKS, HEADS)[0] - exact).norm().item()

    by_keys = measure()
    monkeypatch.setattr(landmarks, "find_metric", lambda seen: torch.eye(seen.shape[-1]).expand(len(seen), -1, -1))
    assert by_keys < 0.6 * measure()


def test_queries_far_from_all_others_do_not_unsettle_the_system():
    x = draw_smooth(16, 16)
    x[:, 4] *= 10
    exact, short = attend(x, x, x), attend(x, x[:, :20], x[:, :20])
    out = carry_missed(attend, x, x, x, [short.clone()], MARKS, HEADS)[0]
    assert (out - exact)[:, 5:].norm() < (short - exact)[:, 5:].norm()


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_one_landmark_far_out_hardly_spoils_what_the_others_say(seed):
    """A kernel as wide as the mean way to a landmark would err eight to twenty times as much here."""

    def measure(way: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        spread, bend = (torch.randn(3, 32, generator=generator) for _ in range(2))
        places = torch.randn(1, 2000, 3, generator=generator)
        places[:, 0] *= way * 3**0.5 / places[:, 0].norm()
        queries, missed = places @ spread, torch.sin(0.7 * places @ bend + 0.3)
        carriers = solve_carriers(queries[:, :64], queries[:, :64], [missed[:, :64]], heads=1)
        carried = plain_attention(queries, *carriers, {"n_heads": 1}, None)
        return (carried - missed)[:, 64:].norm().item()

    assert measure(4.0) < 1.5 * measure(1.0)


def test_the_solution_has_the_gradients_of_any_other():
    torch.manual_seed(0)
    root, right = torch.randn(3, 8, 8, dtype=torch.double), torch.randn(2, 3, 8, 5, dtype=torch.double)
    inputs = root.requires_grad_(), right.requires_grad_()

    def make_system(root):
        return root @ root.mT + torch.eye(8)

    assert torch.autograd.gradcheck(lambda root, right: solve_positive(make_system(root), right), inputs)
    found = solve_positive(make_system(root), right)
    torch.testing.assert_close(found, torch.linalg.solve(make_system(root), right))
    with torch.no_grad():
        torch.testing.assert_close(solve_positive(make_system(root), right), found)


@torch.no_grad()
def test_the_system_is_solved_in_few_operations():
    """Its tensors are small: on a GPU each operation costs a launch, whatever is in it."""
    x = draw_smooth(8, 8).half()
    with Count() as count:
        solve_carriers(x, x, [x], HEADS)
    assert len(count.names) <= 40, count.names
