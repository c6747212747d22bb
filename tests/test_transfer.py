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
