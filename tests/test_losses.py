"""Loss terms reach the student, count as they are set, and are the same however a step is computed."""

import pytest
import torch

from dha.checkpoint import load_student


@pytest.mark.parametrize("step", [0, 3])
def test_parts_of_a_batch_give_the_whole_batch_s_losses_and_gradients(prepare, make_settings, step):
    losses, gradients = [], []
    for accumulation in (1, 4):
        training = prepare(make_settings(train__batch=4, train__accumulation=accumulation, train__clip=0.0))
        training.take_step(step, training.read_step(step))
        losses.append(training.losses)
        gradients.append(torch.cat([p.grad.flatten() for p in training.parameters if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def measure(training, terms, **options):
    """Loss terms of one stage-2 batch and the student's gradients of their sum."""
    from dkd_trainer.engine.imitation import imitation_losses

    (batch,) = training.read_step(3)
    losses = imitation_losses(training.teacher, training.student, batch, terms, **options)
    training.optimizer.zero_grad()
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in training.student.named_parameters() if p.grad is not None}


def test_recomputed_layers_give_the_same_gradients_and_are_left_as_they_were(teacher, prepare, make_settings):
    training = prepare(make_settings())
    terms = ("output", "blocks", "attention")
    kept, expected = measure(training, terms)
    again, found = measure(training, terms, checkpointing=True)
    assert {n: v.item() for n, v in kept.items()} == {n: v.item() for n, v in again.items()}
    assert expected.keys() == found.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert not [layer for layer in teacher.unet.modules() if "forward" in vars(layer)]
    assert not [layer for layer in teacher.unet.modules() if layer._forward_hooks]


@pytest.mark.parametrize("term", ["output", "noise", "blocks", "attention"])
def test_every_loss_term_reaches_the_student(prepare, make_settings, term):
    training = prepare(make_settings())
    losses, gradients = measure(training, (term,))
    assert set(losses) == {term} and losses[term].item() > 0
    moved = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert {name.split(".")[2] for name in moved} >= {"deltas", "memory", "router"}


def test_guidance_compares_what_the_sampler_mixes(teacher, prepare, make_settings):
    from dkd_trainer.engine.imitation import imitation_losses, list_runs
    from dkd_trainer.engine.transfer import relative_error

    training = prepare(make_settings(imitation__guidance=[3.0, 6.0]))
    (batch,) = training.read_step(3)
    assert (batch.guidance >= 3).all() and (batch.guidance <= 6).all() and batch.guidance.std() > 0

    def mix(options):
        prompted = teacher.predict(batch.noisy, batch.t, batch.context, options)
        empty = teacher.predict(batch.noisy, batch.t, batch.empty.expand_as(batch.context), options)
        return empty + batch.guidance.view(-1, 1, 1, 1) * (prompted - empty)

    expected = relative_error(mix(list_runs(training.student, batch, spread=1.0)[0]), mix({}))
    found = imitation_losses(teacher, training.student, batch, ("output",), guided=True)["output"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_terms_are_scaled_to_the_size_of_the_prediction_s_and_join_when_it_is_known():
    from dkd_trainer.engine.stages import Balance, Stage
    from dkd_trainer.settings import ImitationSettings

    stage = Stage("quality", 10, ImitationSettings(steps=11, blocks=0.5, noise=(0.0, 1.0)))
    balance = Balance()
    assert balance.weigh(stage, 10) == {"output": 1.0, "noise": 0.0, "blocks": 0.0}
    balance.follow(stage, {"output": 0.01, "noise": 4.0, "blocks": 0.2})
    half, end = balance.weigh(stage, 15), balance.weigh(stage, 20)
    assert half == pytest.approx({"output": 1.0, "noise": 0.5 * 0.01 / 4, "blocks": 0.5 * 0.01 / 0.2})
    assert end["noise"] == pytest.approx(0.01 / 4)
    assert Balance(balance.sizes).weigh(stage, 15) == half


def test_learning_rates_warm_up_and_fall_in_each_stage():
    from dkd_trainer.engine.stages import Stage
    from dkd_trainer.settings import TransferSettings

    cosine = Stage("transfer", 100, TransferSettings(steps=100, rate=0.5, warmup=10))
    constant = Stage("transfer", 100, TransferSettings(steps=100, rate=0.5, warmup=10, schedule="constant"))
    assert cosine.rate(100) == constant.rate(100) == pytest.approx(0.05)
    assert cosine.rate(110) == constant.rate(110) == constant.rate(199) == pytest.approx(0.5)
    assert cosine.rate(199) < 0.02
    assert Stage("transfer", 0, TransferSettings(steps=9, rate=0.5, warmup=0)).rate(0) == pytest.approx(0.5)


def test_the_official_preset_trains_published_layers_with_its_defects_repaired(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import Training
    from dkd_trainer.engine.processes import Processes

    # the preset's losses, shortened: what a preset says of the student would be changed by TINY
    student = {"mode": "official", "levels": [0, 1, 2, 3], "memory": 0, "rank": 0, "router_width": 0}
    changes = {f"student__{name}": value for name, value in student.items()}
    steps = {"transfer__steps": 0, "imitation__steps": 2, "quality__steps": 1, "imitation__rate": 1e-3}
    settings = make_settings(preset="official", **changes, **steps)
    training = Training(teacher, corpus, settings, Processes(settings.train))
    site = training.student.list_sites()[0]
    module, attention = training.student.site(site), teacher.attention(site)
    assert torch.equal(module.sa_attn.to_q.weight, attention.to_q.weight)
    (batch,) = training.read_step(0)
    terms = training.stages[0].measure(teacher, training.student, batch, False)
    assert set(terms) == {"output", "noise", "blocks", "maps", "routing"}
    for term, part in (("maps", module.sa_attn.to_k.weight), ("routing", module.gating_network[2].weight)):
        (gradient,) = torch.autograd.grad(terms[term], part, retain_graph=True)
        assert gradient.abs().max() > 0, term
    assert training.balance.weigh(training.stages[0], 0)["noise"] == 5.0
    assert training.balance.weigh(training.stages[1], 2)["noise"] == 8.0
    training.run()
    saved = load_student(settings.out, head_width=teacher.head_width)
    assert saved.config.mode == "official"
    assert all(torch.isfinite(t).all() for t in saved.named_weights().values())
