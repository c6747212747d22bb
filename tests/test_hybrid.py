"""The hybrid context: plain attention when nothing is left out, the oracle's outputs and gradients everywhere."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dha.config import ConfigError, DHAConfig
from dha.hybrid import HybridSite
from dha.memory import Memory
from dha.patch import plain_attention
from dha.places import list_places
from dha.reference import attend_hybrid
from dha.routing import ContextPlan, plan_context, to_picture

CHANNELS, HEADS, EMBEDDING = 32, 2, 24


def make_layer(**settings):
    torch.manual_seed(0)
    linear = {n: nn.Linear(CHANNELS, CHANNELS, bias=n == "to_out") for n in ("to_q", "to_k", "to_v", "to_out")}
    site = HybridSite(CHANNELS, EMBEDDING, DHAConfig(**settings))
    site.start()
    for parameter in site.parameters():  # the zero start would hide wrong corrections
        nn.init.normal_(parameter, std=0.2)
    return site, nn.ModuleDict(linear)


def attend_fast(site, layer, x, emb, plan):
    return site(SimpleNamespace(**dict(layer.items())), plain_attention, x, emb, plan, HEADS)


FULL = {"memory": 5, "rank": 4, "router_width": 8, "local": 6, "blend": True}
SETTINGS = {
    "all parts": FULL,
    "grid alone": {},
    "grid and router": {"router_width": 8},
    "grid and memory": {"memory": 3},
    "grid and landmarks": {"landmarks": 12},
    "all parts and landmarks": {**FULL, "landmarks": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("height,width,batch", [(7, 9, 1), (7, 9, 3), (8, 8, 2), (33, 64, 1)])
def test_fast_path_matches_the_oracle_in_outputs_and_gradients(name, height, width, batch):
    site, layer = make_layer(**SETTINGS[name])
    torch.manual_seed(1)
    routed = site.router is not None
    budget = 0.2 if height < 30 else 0.02
    plan = plan_context(height, width, budget, 0.5, 4096, routed, SETTINGS[name].get("landmarks", 0))
    x = torch.randn(batch, height * width, CHANNELS, requires_grad=True)
    emb = torch.randn(batch, EMBEDDING)
    oracle_site, oracle_layer, oracle_x = copy.deepcopy(site), copy.deepcopy(layer), x.detach().clone().requires_grad_()
    fast = attend_fast(site, layer, x, emb, plan)
    names = SimpleNamespace(**dict(oracle_layer.items()))
    slow = attend_hybrid(oracle_site, names, oracle_x, emb, plan, HEADS)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)
    target = torch.randn_like(fast)
    (fast * target).sum().backward()
    (slow * target).sum().backward()
    torch.testing.assert_close(x.grad, oracle_x.grad, atol=2e-5, rtol=1e-4)
    for (part, a), b in zip(site.named_parameters(), oracle_site.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), part
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=2e-4, rtol=1e-3, msg=lambda m, p=part: f"{p}: {m}")


@pytest.mark.parametrize("name", [*SETTINGS, "all parts but a blend, and landmarks"])
def test_several_grids_at_once_are_the_same_as_one_after_the_other(name):
    settings = SETTINGS.get(name, {**FULL, "blend": False, "landmarks": 12})
    site, layer = make_layer(**settings)
    plan = plan_context(7, 9, 0.2, 0.5, 4096, site.router is not None, settings.get("landmarks", 0))
    places = list_places(plan, torch.tensor([3, 1000, 3]))
    layer = SimpleNamespace(**dict(layer.items()))
    found = []
    for run in (
        lambda *x: site.run_places(layer, plain_attention, *x, plan, HEADS, places),
        lambda *x: [site(layer, plain_attention, *x, plan, HEADS, place) for place in places],
    ):
        torch.manual_seed(1)
        x, emb = torch.randn(2, 63, CHANNELS, requires_grad=True), torch.randn(2, EMBEDDING)
        outputs = torch.stack(run(x, emb))
        site.zero_grad()
        (outputs * torch.randn(outputs.shape)).sum().backward()
        found.append([outputs, x.grad, *(part.grad for part in site.parameters())])
    assert not torch.equal(found[0][0][0], found[0][0][1])
    for at_once, apart in zip(*found, strict=True):
        torch.testing.assert_close(at_once, apart, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("height,width", [(7, 9), (8, 8)])
def test_every_token_chosen_is_plain_attention(height, width):
    site, layer = make_layer(router_width=8)
    x, emb = torch.randn(2, height * width, CHANNELS), torch.randn(2, EMBEDDING)
    plan = ContextPlan(height, width, strides=(0, 0), chosen=height * width)
    fast = attend_fast(site, layer, x, emb, plan)
    plain = layer["to_out"](
        plain_attention(layer["to_q"](x), layer["to_k"](x), layer["to_v"](x), {"n_heads": HEADS}, None)
    )
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=0)


def test_stride_one_grid_is_plain_attention():
    site, layer = make_layer()
    x, emb = torch.randn(2, 63, CHANNELS), torch.randn(2, EMBEDDING)
    fast = attend_fast(site, layer, x, emb, ContextPlan(7, 9, strides=(1, 1), chosen=0))
    plain = layer["to_out"](
        plain_attention(layer["to_q"](x), layer["to_k"](x), layer["to_v"](x), {"n_heads": HEADS}, None)
    )
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=0)


def test_memory_follows_the_picture_in_any_order_of_its_tokens():
    torch.manual_seed(0)
    memory = Memory(CHANNELS, 5)
    memory.start()
    x, other = torch.randn(2, 63, CHANNELS), torch.randn(2, 63, CHANNELS)
    with torch.no_grad():
        assert memory(x).shape == (2, 5, CHANNELS)
        assert not torch.equal(memory(x), memory(other))
        torch.testing.assert_close(memory(x[:, torch.randperm(63)]), memory(x))


def test_a_student_needs_no_mask_where_no_gradient_is_asked_for():
    site, _ = make_layer(**FULL)
    x, emb, plan = torch.randn(2, 64, CHANNELS), torch.randn(2, EMBEDDING), ContextPlan(8, 8, (4, 2), 8)
    with torch.no_grad():
        assert site.build_context(x, emb, plan).mixing.log_weights is None
    weights = site.build_context(x, emb, plan).mixing.log_weights
    assert weights.requires_grad and not weights.any()


def test_router_receives_a_gradient():
    site, layer = make_layer(router_width=8)
    x, emb = torch.randn(2, 64, CHANNELS), torch.randn(2, EMBEDDING)
    attend_fast(site, layer, x, emb, ContextPlan(8, 8, (4, 4), 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in site.router.parameters())


def test_fresh_student_equals_the_training_free_one_but_for_router_and_memory():
    site, layer = make_layer(rank=4, local=6, blend=True)
    site.start()
    free, _ = make_layer()
    x, emb = torch.randn(2, 64, CHANNELS), torch.randn(2, EMBEDDING)
    plan = ContextPlan(8, 8, (2, 2), 0)
    with torch.no_grad():
        a, b = attend_fast(site, layer, x, emb, plan), attend_fast(free, layer, x, emb, plan)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_single_precision(dtype):
    site, layer = make_layer(**FULL)
    torch.manual_seed(2)
    x, emb = torch.randn(2, 63, CHANNELS), torch.randn(2, EMBEDDING)
    plan = plan_context(7, 9, 0.3, 0.5, 4096, True)
    with torch.no_grad():
        exact = attend_fast(site, layer, x, emb, plan)
        with torch.autocast("cpu", dtype):
            cast = attend_fast(site, layer, x, emb, plan)
    assert torch.isfinite(cast).all()
    assert (cast.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("height,width", [(7, 9), (33, 64), (64, 64), (1, 5), (96, 96)])
@pytest.mark.parametrize("budget", [0.03, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("routed", [True, False])
def test_plan_never_exceeds_its_budget(height, width, budget, routed):
    plan = plan_context(height, width, budget, 0.5, 1000, routed)
    assert 1 <= plan.coarse + plan.chosen <= max(1, min(round(budget * height * width), 1000))
    assert plan.chosen <= plan.tokens


def test_a_retired_setting_is_passed_over_where_it_changed_nothing_and_refused_elsewhere():
    values = json.loads(DHAConfig(memory=3).to_json())
    assert DHAConfig.from_json(json.dumps({**values, "weighted": False})) == DHAConfig(memory=3)
    with pytest.raises(ConfigError, match="unknown DHA setting.*weighted"):
        DHAConfig.from_json(json.dumps({**values, "weighted": True}))
    assert DHAConfig.from_json(json.dumps({**values, "gather": True})) == DHAConfig(memory=3)
    assert DHAConfig.from_json(json.dumps({**values, "memory": 0, "gather": False})) == DHAConfig()
    with pytest.raises(ConfigError, match="'gather' is False, expected true"):
        DHAConfig.from_json(json.dumps({**values, "gather": False}))


def test_a_single_picture_is_laid_out_as_kernels_want_it():
    """Channels last as far as PyTorch sees it: what it makes of such a picture has that layout too."""
    for batch in (1, 2):
        pooled = F.avg_pool2d(to_picture(torch.randn(batch, 12 * 10, 8), 12, 10), 2)
        assert pooled.stride()[1:] == (1, 5 * 8, 8)
