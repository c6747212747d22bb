"""Attention as matrix products: the same attention, in slices that fit a processor's caches, where it is faster."""

import sys
from functools import partial

import pytest
import torch

from dha import matrix_attention
from dha.matrix_attention import attend_by_products, choose_slice, count_empty, multiplies_bf16, suits_products
from dha.patch import make_patches, plain_attention
from dha.sites import SITES, Architecture
from dha.student import FREE_CONFIG, Student
from dkd_trainer.evidence.pair_counter import PairCounter

HEADS, WIDTH = 3, 16
SHAPES = {
    "short": (2, 300, 40),
    "no multiple of 32": (2, 300, 250),
    "landmarks": (2, 20, 300),
    "one query": (1, 1, 7),
    "one key": (1, 9, 1),
}


def draw(batch: int, queries: int, keys: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return tuple(torch.randn(batch, n, HEADS * WIDTH, generator=generator).to(dtype) for n in sizes)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return plain_attention(q, k, v, {"n_heads": HEADS}, None)


def measure_error(found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    exact = attend(q.double(), k.double(), v.double())
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("room", [1, 60, 1000, 1 << 21], ids="{} logits".format)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_products_are_attention_in_slices_of_any_size(monkeypatch, shape, room):
    monkeypatch.setattr(matrix_attention, "LOGITS", room)
    q, k, v = draw(*SHAPES[shape])
    torch.testing.assert_close(attend_by_products(q, k, v, HEADS), attend(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys,empty", [(7, 0), (36, 0), (143, 17), (256, 0), (286, 2), (572, 4), (1023, 1), (1025, 0)])
def test_keys_are_filled_up_where_that_costs_little(keys, empty):
    assert count_empty(keys) == empty


@torch.no_grad()
def test_parts_of_larger_tensors_are_read_where_they_lie():
    q, k, v = (torch.cat([part, part], dim=1)[:, : part.shape[1]] for part in draw(2, 50, 30))
    assert not q.is_contiguous()
    torch.testing.assert_close(attend_by_products(q, k, v, HEADS), attend(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("room", [1000, 1 << 21], ids=["head by head", "heads together"])
@pytest.mark.parametrize("offset", [0, 1, 5], ids="keys lie {} off zero".format)
@torch.no_grad()
def test_bf16_errs_little_more_than_pytorch_does(monkeypatch, offset, room):
    """Logits rounded to bf16: keys far from zero would have large ones, and all their digits there."""
    monkeypatch.setattr(matrix_attention, "LOGITS", room)
    q, k, v = draw(2, 300, 200)
    q, k = q + offset, k + offset
    low = [part.bfloat16() for part in (q, k, v)]
    ours, theirs = (measure_error(found, q, k, v) for found in (attend_by_products(*low, HEADS), attend(*low)))
    assert ours < 2 * theirs < 0.1


@pytest.mark.parametrize("queries", [64, 4096, 9216, 147456])
@pytest.mark.parametrize("keys", [16, 288, 9216])
def test_a_slice_is_as_large_as_the_caches(monkeypatch, queries, keys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    heads, rows = choose_slice(5, queries, keys)
    room = 4 * matrix_attention.LOGITS
    assert heads * rows * keys <= room and 1 <= heads <= 5 and (heads == 1 or rows == queries)
    assert rows == queries or 2 * rows * keys > room / 2, "slices are thinner than they need to be"
    assert heads == 5 or (heads + 1) * rows * keys > matrix_attention.LOGITS, "one by one, though they are small"


def tell(monkeypatch, **capabilities: bool) -> None:
    """Make PyTorch say so of the processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(matrix_attention, "multiplies_bf16", multiplies_bf16.__wrapped__)


SUITED = {
    "bf16": True,
    "fp32": False,
    "with gradients": False,
    "few": False,
    "thin slices": False,
    "AMX": False,
    "no bf16": False,
    "large logits": False,
}


@pytest.mark.parametrize("case", SUITED)
def test_products_are_used_only_where_they_are_faster(monkeypatch, case):
    tell(monkeypatch, avx512_bf16=case != "no bf16", amx_bf16=case == "AMX")
    queries, keys = (16, 16) if case == "few" else (64, 1 << 26) if case == "thin slices" else (4096, 256)
    q = torch.full((1, 1, HEADS * WIDTH), 30.0, dtype=torch.bfloat16).expand(1, queries, -1)
    k = torch.full((1, 1, HEADS * WIDTH), 30.0, dtype=torch.bfloat16).expand(1, keys, -1)
    if case == "fp32":
        q = q.float()
    if case == "large logits":
        k = torch.randn(1, keys, HEADS * WIDTH).bfloat16()
    with torch.set_grad_enabled(case == "with gradients"):
        assert suits_products(q, k, HEADS) is SUITED[case]


@torch.no_grad()
def test_reach_is_the_largest_logit_there_can_be():
    """Of keys as they are used, from their middle: far from zero, all together, they reach no farther."""
    q, k, _ = draw(2, 40, 30)
    heads = [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (q, k - k.mean(1, keepdim=True))]
    largest = (heads[0] @ heads[1].mT).abs().max() * WIDTH**-0.5
    reach = matrix_attention.find_reach(q, k, HEADS)
    assert largest <= reach < 10 * largest
    assert matrix_attention.find_reach(q, k + 100, HEADS) == pytest.approx(reach, rel=1e-4)


@pytest.mark.parametrize("known", [{}, {"avx512_bf16": True}, {"amx_bf16": False}], ids=str)
def test_of_a_processor_that_pytorch_knows_little_of_nothing_is_assumed(monkeypatch, known):
    tell(monkeypatch, **known)
    assert not matrix_attention.multiplies_bf16()


@torch.no_grad()
def test_torch_compile_keeps_the_fused_kernel_and_its_graph_whole(monkeypatch):
    tell(monkeypatch, avx512_bf16=True, amx_bf16=False)
    q, k, v = (part.bfloat16() for part in draw(1, 4096, 256))
    assert suits_products(q, k, HEADS)

    @partial(torch.compile, backend="eager", fullgraph=True)
    def choose(q, k, v):
        return attend_by_products(q, k, v, HEADS) if suits_products(q, k, HEADS) else attend(q, k, v)

    assert torch.equal(choose(q, k, v), attend(q, k, v))


@pytest.mark.parametrize("side", [32, 64, 96])
@torch.no_grad()
def test_reach_is_not_that_of_one_column(side):
    """Long queries in the middle half of a picture, and none at its borders."""
    q, k, _ = draw(1, side * side, 50)
    reach = matrix_attention.find_reach(q, k, HEADS)
    q.unflatten(1, (side, side))[:, :, side // 4 : -side // 4] *= 100
    assert matrix_attention.find_reach(q, k, HEADS) > 20 * reach


@torch.no_grad()
def test_their_pairs_are_counted_like_those_of_the_fused_kernel():
    q, k, v = draw(2, 50, 30)
    with PairCounter() as ours:
        attend_by_products(q, k, v, HEADS)
    with PairCounter() as theirs:
        attend(q, k, v)
    assert ours.pairs == theirs.pairs == 2 * 50 * 30


@pytest.fixture
def kernel(pack, monkeypatch):
    """The host's choice of a kernel, where products are always the faster one."""
    module = sys.modules[f"{pack.__name__}.nodes.kernel"]
    monkeypatch.setattr(module, "suits_products", lambda q, k, heads: True)
    return module


def count_products(kernel, monkeypatch) -> list:
    calls, own = [], kernel.attend_by_products
    monkeypatch.setattr(kernel, "attend_by_products", lambda *args: calls.append(1) or own(*args))
    return calls


@torch.no_grad()
def test_masks_and_whole_attentions_keep_the_hosts_kernel(kernel, monkeypatch):
    calls, (q, k, v) = count_products(kernel, monkeypatch), draw(1, 50, 30)
    options = {"n_heads": HEADS}
    torch.testing.assert_close(kernel.attend_short(q, k, v, options, None), attend(q, k, v), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    kernel.attend_short(q, k, v, options, torch.zeros(1, 1, 1, 30))
    kernel.attend(q, k, v, options, None)
    assert len(calls) == 1


def test_a_layer_that_is_left_as_it_is_never_sees_the_faster_attention():
    """Whatever others did to its queries: ToMe merges them, so that there are fewer than keys."""
    student = Student(FREE_CONFIG, Architecture({site.name: 32 for site in SITES}, 128, 128))
    patches = make_patches(student, lambda *args: "host", attend_short=lambda *args: pytest.fail("not a short context"))
    assert patches.replace(*draw(1, 20, 40), {"n_heads": HEADS}) == "host"


@pytest.mark.parametrize("way", ["replaced", "replaced in both places", "overridden", "another of ComfyUI's"])
@torch.no_grad()
def test_a_kernel_that_was_chosen_is_not_passed_over(kernel, monkeypatch, way):
    from comfy.ldm.modules import attention

    seen, own = [], attention.attention_pytorch
    calls, (q, k, v) = count_products(kernel, monkeypatch), draw(1, 50, 30)
    options = {"n_heads": HEADS}

    def other(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    if way == "overridden":
        options["optimized_attention_override"] = lambda func, *args, **kw: other(*args, **kw)
    elif way == "another of ComfyUI's":
        monkeypatch.setattr(attention, "optimized_attention", attention.attention_sub_quad)
    else:
        monkeypatch.setattr(attention, "optimized_attention", other)
        if way == "replaced in both places":
            monkeypatch.setattr(attention, "attention_pytorch", other)
    kernel.attend_short(q, k, v, options, None)
    assert not calls and (seen or way == "another of ComfyUI's")


def test_pictures_by_products_are_the_same_to_the_eye(studio, kernel, monkeypatch):
    calls, patched = count_products(kernel, monkeypatch), studio.apply()
    drawn = studio.draw(patched)
    assert calls
    monkeypatch.setattr(kernel, "suits_products", lambda q, k, heads: False)
    torch.testing.assert_close(drawn, studio.draw(patched), rtol=1e-2, atol=1e-3)
