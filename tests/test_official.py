"""Compatibility mode reproduces the published modules' outputs and choices."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dha.official import ExternalAttention, OfficialSite

GOLDEN = Path(__file__).parent / "golden" / "dha_reference.safetensors"


def read_case(name):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {k.removeprefix(f"{name}/"): file.get_tensor(k) for k in file.keys() if k.startswith(f"{name}/")}  # noqa: SIM118
        settings = dict(pair.split("=") for pair in file.metadata()[name].split())
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    return tensors, weights, settings


@pytest.mark.parametrize("case", [f"dha{i}" for i in range(5)])
def test_published_dha_is_reproduced_to_1e_5_with_the_same_indices(case):
    tensors, weights, settings = read_case(case)
    site = OfficialSite(
        int(settings["query_dim"]),
        int(settings["time_embed_dim"]),
        int(settings["n_heads"]),
        float(settings["sparsity"]),
        settings["routing"],
    )
    site.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(site(tensors["x"], tensors["t_emb"]), tensors["y"], atol=1e-5, rtol=0)
        torch.testing.assert_close(site(tensors["x"], None), tensors["y_no_temb"], atol=1e-5, rtol=0)
        torch.testing.assert_close(site.ea_attn(tensors["x"]), tensors["ea"], atol=1e-5, rtol=0)
        assert torch.equal(site.choose(tensors["x"], tensors["t_emb"]).sort().values, tensors["indices"].sort().values)


def test_published_external_attention_is_reproduced_alone():
    tensors, weights, settings = read_case("ea0")
    layer = ExternalAttention(int(settings["in_channels"]), int(settings["num_heads"]), int(settings["M"]))
    layer.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(layer(tensors["x"]), tensors["y"], atol=1e-5, rtol=0)


def test_unknown_routing_is_refused_by_name():
    with pytest.raises(ValueError, match="'random'"):
        OfficialSite(64, 256, 2, routing="random")


def test_a_site_runs_in_lower_precision_on_an_input_that_is_not():
    site = OfficialSite(64, 32, 2)
    for parameter in site.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, emb = torch.randn(2, 35, 64), torch.randn(2, 32)  # a layer norm gives fp32 under CUDA's autocast
    with torch.no_grad():
        expected = site(x, emb)
        with torch.autocast("cpu", torch.bfloat16):
            lowered = site(x, emb)
    assert lowered.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(lowered.flatten(), expected.flatten(), dim=0) > 0.95
