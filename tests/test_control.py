"""The control branch reproduces the published one: its pairs, and the prediction of the UNet that they steer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dha.control import PREFIX, FCNet, Pair, embed_time, make_decoder_patch

GOLDEN = Path(__file__).parent / "golden" / "fcnet_reference.safetensors"
SHAPE = {  # of the small UNet in the golden file
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": 24,
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def unet_class(host):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel


@pytest.fixture(scope="module")
def unet(unet_class, golden):
    unet = unet_class(**SHAPE).eval().requires_grad_(False)
    unet.load_state_dict(take(golden, "diffusion_model."))
    return unet


@pytest.fixture(scope="module")
def branch(unet_class, golden):
    branch = FCNet(unet_class(**SHAPE)).eval().requires_grad_(False)
    branch.load_state_dict(take(golden, PREFIX))
    return branch


def take(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def run_branch(branch, golden):
    hint = branch.embed_hint(golden["hint"])
    return branch(golden["x"], hint, golden["timesteps"], golden["context"], {})


def test_published_pairs_are_reproduced_to_1e_4(branch, golden):
    pairs = run_branch(branch, golden)
    assert len(pairs) == 5
    for number, pair in enumerate(pairs):
        torch.testing.assert_close(pair.add, golden[f"add{number}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(pair.mul, golden[f"mul{number}"], atol=1e-4, rtol=0)


def predict(unet, golden, pairs=None):
    options = {"pairs": pairs, "patches": {"output_block_patch": [make_decoder_patch("pairs")]}}
    return unet(golden["x"], golden["timesteps"], context=golden["context"], transformer_options=options)


def test_published_predictions_are_reproduced_to_1e_4_with_and_without_control(unet, branch, golden):
    torch.testing.assert_close(predict(unet, golden), golden["eps_uncontrolled"], atol=1e-4, rtol=0)
    controlled = predict(unet, golden, run_branch(branch, golden))
    torch.testing.assert_close(controlled, golden["eps"], atol=1e-4, rtol=0)
    assert (golden["eps"] - golden["eps_uncontrolled"]).abs().max() > 0.1, "this test would prove nothing"


def test_pairs_of_strength_zero_leave_the_prediction_as_it_is(unet, branch, golden):
    pairs = [pair.scale(0.0) for pair in run_branch(branch, golden)]
    assert torch.equal(predict(unet, golden, pairs), predict(unet, golden))


def test_pairs_of_full_strength_are_not_multiplied():
    pair = Pair(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    assert pair.scale(1.0) is pair
    half = pair.scale(0.5)
    assert torch.equal(half.add, pair.add / 2) and torch.equal(half.mul, pair.mul / 2)


def test_gradients_reach_every_weight_of_the_branch_through_a_frozen_unet(unet, unet_class, golden):
    branch = FCNet(unet_class(**SHAPE))
    branch.load_state_dict(take(golden, PREFIX))
    predict(unet, golden, run_branch(branch, golden)).square().sum().backward()
    assert not [name for name, weight in branch.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_sizes_that_do_not_divide_and_any_batch(unet, branch, golden):
    x, hint = torch.randn(3, 4, 10, 14), torch.randn(3, 4, 10, 14)
    case = {"x": x, "hint": hint, "timesteps": torch.tensor([1, 500, 999]), "context": torch.randn(3, 7, 24)}
    together = predict(unet, case, run_branch(branch, case))
    for n in range(3):
        one = {name: tensor[n : n + 1] for name, tensor in case.items()}
        torch.testing.assert_close(predict(unet, one, run_branch(branch, one)), together[n : n + 1], atol=1e-4, rtol=0)


def test_time_is_embedded_as_the_host_embeds_it(host):
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    times = torch.tensor([0.0, 1.5, 999.0])
    torch.testing.assert_close(embed_time(times, 320), timestep_embedding(times, 320))


def test_a_repeated_pair_holds_the_batch_once_for_each_half():
    pair = Pair(torch.arange(2.0).view(2, 1, 1, 1), -torch.arange(2.0).view(2, 1, 1, 1)).repeat(2)
    assert pair.add.flatten().tolist() == [0, 1, 0, 1] and pair.mul.flatten().tolist() == [0, -1, 0, -1]
