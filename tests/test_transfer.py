"""Attention transfer teaches every layer, runs the teacher no further, and a trained mask changes no attention."""

import pytest
import torch

from dha.config import DHAConfig
from dha.patch import plain_attention
from dha.student import Student

CONFIG = DHAConfig(levels=(0,), memory=4, rank=4, router_width=16)


def test_the_teacher_is_run_no_further_than_to_the_last_replaced_layer(teacher):
    from dkd_trainer.engine.features import list_blocks
    from dkd_trainer.engine.transfer import transfer_losses, watch_sites

    torch.manual_seed(0)
    student = Student(CONFIG, teacher.architecture).start()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([100, 900]), teacher.encode_prompts(["octopus", "red apple"])
    whole: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        teacher.predict(*inputs, {"patches": watch_sites(student, teacher.attention, whole)})
    ran = []
    places = [block[-1] for block in list_blocks(teacher.unet)]
    handles = [place.register_forward_hook(lambda *_, number=n: ran.append(number)) for n, place in enumerate(places)]
    try:
        found = transfer_losses(teacher, student, *inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(len(places) - 1)), "the last block holds the last of the replaced layers"
    assert {name: value.item() for name, value in found.items()} == {n: value.item() for n, value in whole.items()}


@pytest.mark.parametrize("batch", [1, 3], ids=["one mask for all", "a mask for each"])
def test_a_trained_mask_gives_the_attention_and_the_gradients_of_any_other(batch):
    from dkd_trainer.engine.attention import trained_attention

    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 11, 12), (3, 7, 12), (3, 7, 12), (batch, 1, 1, 7))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    way = torch.randn(3, 11, 12, generator=generator, dtype=torch.float64)
    q, k, v, mask = inputs
    results = []
    for attend in (trained_attention, plain_attention):
        out = attend(q, k, v, {"n_heads": 2}, mask)
        results.append([out, *torch.autograd.grad((out * way).sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert results[0][-1].abs().min() > 0


def test_attention_transfer_lowers_the_error_of_every_layer(teacher, corpus):
    from dha.config import DHAConfig
    from dha.student import Student
    from dkd_trainer.diffusion import add_noise
    from dkd_trainer.engine.transfer import transfer_losses

    torch.manual_seed(0)
    config = DHAConfig(levels=(0,), memory=4, rank=4, router_width=16)
    student = Student(config, teacher.architecture).start()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    latents, context = corpus.read(range(4))
    t = torch.tensor([100, 400, 700, 900])
    noisy = add_noise(latents, torch.randn(4, 4, 16, 16), t)
    first = None
    for _ in range(20):
        losses = transfer_losses(teacher, student, noisy, t, context)
        first = first or {name: value.item() for name, value in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert len([name for name in first if not name.endswith("/routing")]) == 5
    assert all(losses[name].item() < value for name, value in first.items())


def test_what_two_grids_have_in_common_counts_whole_and_the_rest_for_its_spread():
    from dkd_trainer.engine.transfer import joint_error, relative_error

    generator = torch.Generator().manual_seed(2)
    target = torch.randn(3, 8, 16, generator=generator)
    stays, changes = torch.zeros_like(target), torch.zeros_like(target)
    stays[..., 0], changes[..., 1] = 0.3, 0.5
    outputs = [target + stays + changes, target + stays - changes]
    energy = target.flatten(1).square().sum(1)
    squares = [(part.flatten(1).square().sum(1) / energy).mean() for part in (stays, changes)]
    for spread in (0.0, 0.1, 1.0):
        # two grids whose errors are opposite: their product is what stays less what changes
        expected = squares[0] + (2 * spread - 1) * squares[1]
        torch.testing.assert_close(joint_error(outputs, target, spread), expected)
    torch.testing.assert_close(joint_error(outputs[:1], target, 0.1), relative_error(outputs[0], target))


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_gradients_of_one_grid_alone_are_those_of_both_on_average(spread):
    from dkd_trainer.engine.transfer import joint_error

    torch.manual_seed(0)
    target, weight = torch.randn(3, 8), torch.randn(8, 8, requires_grad=True)
    inputs = torch.randn(2, 3, 8)

    def find_gradient(*order: int) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [inputs[number] @ weight for number in order]
        whole = joint_error(outputs, target, spread)
        half = joint_error([outputs[0], outputs[1].detach()], target, spread)
        torch.testing.assert_close(half, whole)
        return tuple(torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (whole, half))

    (whole, first), (_, second) = find_gradient(0, 1), find_gradient(1, 0)
    assert not torch.allclose(first, second)
    torch.testing.assert_close((first + second) / 2, whole)


def test_a_spread_makes_every_layer_look_at_two_grids(teacher, monkeypatch):
    from dkd_trainer.engine import transfer

    student = Student(CONFIG, teacher.architecture).start()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([100, 900]), teacher.encode_prompts(["octopus", "red apple"])
    seen, compare = [], transfer.joint_error
    monkeypatch.setattr(transfer, "joint_error", lambda o, *rest: seen.append(list(o)) or compare(o, *rest))
    for spread, count in ((1.0, 1), (0.1, 2)):
        seen.clear()
        transfer.transfer_losses(teacher, student, *inputs, seed=3, spread=spread)
        assert [len(outputs) for outputs in seen] == [count] * 5
    assert not any(torch.equal(*outputs) for outputs in seen)
