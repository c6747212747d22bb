"""The training loop on the real mini teacher: it learns, stops and goes on to the bit, and keeps what it has."""

import json
import os
import signal

import pytest
import torch

from dha.checkpoint import load_student

TINY = {
    "student.levels": [0],
    "student.memory": 4,
    "student.rank": 4,
    "student.router_width": 16,
    "transfer.steps": 3,
    "imitation.steps": 3,
    "quality.steps": 0,
    "train.batch": 2,
    "train.device": "cpu",
    "data.size": 128,
    "output.save_every": 2,
    "watch.validate_every": 0,
    "watch.sheet_every": 0,
    "watch.log_every": 1,
}
ALL_TERMS = {"blocks": 0.5, "attention": 0.5, "noise": [0.5, 1.0]}


@pytest.fixture(scope="module")
def teacher(studio):
    from dkd_trainer.host import Teacher

    return Teacher(studio.checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(teacher):
    from conftest import TensorCorpus

    generator = torch.Generator().manual_seed(0)
    prompts = ["red apple, noto style, pink background", "octopus, flat style, white background"]
    context = torch.cat([teacher.encode_prompts([p]) for p in prompts] * 4)
    latents = torch.nn.functional.interpolate(torch.randn(8, 4, 4, 4, generator=generator), scale_factor=4)
    return TensorCorpus({"latents": latents, "context": context, "empty": teacher.encode_prompts([""])})


@pytest.fixture
def make_settings(tmp_path):
    from dkd_trainer.settings import assemble_settings

    def make(name="s", preset="", **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return assemble_settings(
            preset, overrides={**TINY, **changes, "output.file": str(tmp_path / f"{name}.safetensors")}.items()
        )

    return make


@pytest.fixture
def prepare(teacher, corpus):
    """A Training that has not begun."""
    from dkd_trainer.engine.loop import Training
    from dkd_trainer.engine.processes import Processes

    def build(settings, held_out=None):
        return Training(teacher, corpus, settings, Processes(settings.train), held_out)

    return build


def read_journal(settings):
    return [json.loads(line) for line in (settings.work / "journal.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, number, steps):
    """Send a signal to this process while it takes each of `steps`."""
    from dkd_trainer.engine.loop import Training

    take = Training.take_step

    def take_and_stop(self, step, parts, signal_number=0):
        if step in steps:
            os.kill(os.getpid(), number)
        return take(self, step, parts, signal_number or (number if step in steps else 0))

    monkeypatch.setattr(Training, "take_step", take_and_stop)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resumed_training_equals_uninterrupted_training_to_the_bit(teacher, corpus, make_settings, monkeypatch, number):
    from dkd_trainer.engine.loop import train_student
    from dkd_trainer.engine.state import TrainingStopped

    terms = {f"{stage}__{name}": value for stage in ("imitation", "quality") for name, value in ALL_TERMS.items()}
    terms |= {"quality__steps": 2, "train__batch": 4, "train__accumulation": 2}
    train_student(teacher, corpus, make_settings("whole", **terms))
    parts = make_settings("parts", **terms)
    with monkeypatch.context() as patched:
        stop_at(patched, number, (1, 2, 3, 5))  # within a stage, at its last step, at its first, at the next one's end
        for stopped_at in (2, 3, 4, 6):
            with pytest.raises(TrainingStopped, match=f"step {stopped_at}"):
                train_student(teacher, corpus, parts)
            assert not parts.out.exists()
    train_student(teacher, corpus, parts)
    whole, resumed = (load_student(parts.out.with_name(f"{n}.safetensors")).named_weights() for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [entry["step"] for entry in read_journal(parts) if entry["event"] == "step"]
    assert steps == list(range(1, 9))


def test_a_state_of_other_settings_is_not_continued(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student

    train_student(teacher, corpus, make_settings(transfer__steps=1, imitation__steps=0))
    with pytest.raises(ValueError, match="transfer.steps was 1, is 2"):
        train_student(teacher, corpus, make_settings(transfer__steps=2, imitation__steps=0))


def test_a_loss_that_is_no_number_stops_the_training_before_it_spoils_the_state(
    teacher, corpus, make_settings, monkeypatch
):
    from dkd_trainer.engine import stages
    from dkd_trainer.engine.loop import train_student

    imitate = stages.imitation_losses

    def spoil(*arguments):
        return {name: value * float("nan") for name, value in imitate(*arguments).items()}

    monkeypatch.setattr(stages, "imitation_losses", spoil)
    settings = make_settings()
    with pytest.raises(FloatingPointError, match="step 3 .output nan"):
        train_student(teacher, corpus, settings)
    state = torch.load(settings.work / "state-00000002.pt", weights_only=True)
    assert [file.name for file in settings.work.glob("state*")] == ["state-00000002.pt"]
    assert all(torch.isfinite(t).all() for t in state["student"].values())


def test_a_full_disk_is_said_and_the_old_state_is_kept(teacher, corpus, make_settings, monkeypatch):
    from dkd_trainer.engine.loop import train_student
    from dkd_trainer.engine.state import StateFolder

    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    settings, save = make_settings(), StateFolder.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_little_room(self, step, state):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return save(self, step, state)

    with monkeypatch.context() as patched:
        patched.setattr(StateFolder, "save", save_with_little_room)
        try:
            with pytest.raises(OSError, match=r"state-00000004.pt could not be written .* make room"):
                train_student(teacher, corpus, settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    files = sorted(file.name for file in settings.work.iterdir())
    assert files == ["journal.jsonl", "state-00000002.pt"]
    train_student(teacher, corpus, settings)
    assert settings.out.exists()


def test_the_last_states_are_kept_and_a_damaged_one_is_passed_over(teacher, corpus, make_settings, capsys):
    from dkd_trainer.engine.loop import train_student

    settings = make_settings(output__save_every=1, output__keep=3)
    train_student(teacher, corpus, settings)
    whole, states = settings.out.read_bytes(), sorted(settings.work.glob("state*"))
    assert [state.name for state in states] == [f"state-0000000{step}.pt" for step in (4, 5, 6)]
    states[-1].write_bytes(states[-1].read_bytes()[:5000])
    settings.out.unlink()
    train_student(teacher, corpus, settings)
    assert "state-00000006.pt is damaged" in capsys.readouterr().out
    assert load_weights_equal(whole, settings.out.read_bytes())


def load_weights_equal(first, second):
    from safetensors.torch import load

    a, b = load(first), load(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_journal_tells_what_happened_and_forgets_what_is_done_again(tmp_path):
    from dkd_trainer.engine.journal import Journal

    journal = Journal(tmp_path / "journal.jsonl")
    for event, step in (("start", 0), ("step", 1), ("save", 2), ("step", 2), ("step", 3), ("stop", 2)):
        journal.write(event, step=step)
    journal.write("error", message="the disk is full")
    with journal.path.open("a") as file:
        file.write('{"event": "step", "st')
    journal.cut(2)
    left = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [(entry["event"], entry["step"]) for entry in left] == [("start", 0), ("step", 1), ("save", 2), ("step", 2)]
    journal.cut(0)
    assert journal.path.read_text() == ""


def test_a_run_is_seen_while_it_runs_and_leaves_its_settings_and_record(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student
    from dkd_trainer.settings import assemble_settings

    watch = {"watch__validate_every": 4, "watch__sheet_every": 6, "watch__tensorboard": False}
    settings = make_settings(**watch)
    train_student(teacher, corpus, settings)
    entries = read_journal(settings)
    events = [entry["event"] for entry in entries]
    assert events[0] == "start" and events[-1] == "end" and events.count("step") == 6
    assert (events.count("validation"), events.count("sheet"), events.count("save")) == (2, 1, 3)
    by_event = {entry["event"]: entry for entry in entries}
    assert set(by_event["validation"]["errors"]) == {"0-100", "100-300", "300-600", "600-1000", "mean"}
    assert (settings.work / by_event["sheet"]["file"]).read_bytes().startswith(b"\x89PNG")
    step = next(entry for entry in entries if entry["event"] == "step")
    assert step["stage"] == "transfer" and set(step["losses"]) == {"attention", "routing"}
    assert step["images_per_second"] > 0 and step["seconds_left"] > 0
    assert assemble_settings(config=settings.out.with_suffix(".toml")) == settings
    record = json.loads(settings.out.with_suffix(".json").read_text())
    assert record["validation"] == by_event["validation"]["errors"] and record["steps"] == 6
    assert str(settings.work.parent) not in settings.out.with_suffix(".json").read_text()


def test_tensorboard_gets_every_loss_term_and_the_sheets(teacher, corpus, make_settings):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from dkd_trainer.engine.loop import train_student

    settings = make_settings(watch__tensorboard=True, watch__validate_every=3, watch__sheet_every=6)
    train_student(teacher, corpus, settings)
    events = accumulator.EventAccumulator(str(settings.work / "tensorboard"))
    events.Reload()
    assert {"transfer/attention", "transfer/routing", "validation/mean"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("imitation/output")] == [4, 5, 6]
    assert [event.step for event in events.Images("sheet")] == [6]


def test_pairs_set_aside_for_validation_are_never_trained_on(prepare, make_settings):
    training = prepare(make_settings(watch__validate_every=1, train__batch=8))
    drawn = {pick for step in range(40) for pick in training.sampler.draw(step).picks}
    assert len(drawn) == 7 and len(training.examination.latents) == 1


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.9])
def test_a_large_budget_trains_and_never_replaces_nothing(teacher, prepare, make_settings, budget):
    training = prepare(make_settings(student__token_budget=budget, student__coarse_share=0.0))
    assert max(training.sampler.budgets[16, 16]) < 1
    for step in range(4):
        training.take_step(step, training.read_step(step))
    assert training.losses


def test_a_budget_that_replaces_nothing_is_refused(prepare, make_settings):
    with pytest.raises(ValueError, match="token_budget 1 replaces nothing at a latent of 16x16"):
        prepare(make_settings(student__token_budget=1.0, student__coarse_share=0.0))


def test_a_student_without_trained_parts_is_refused(prepare, make_settings):
    with pytest.raises(ValueError, match="no trained parts"):
        parts = {"memory": 0, "rank": 0, "router_width": 0, "local": 0, "blend": False}
        prepare(make_settings(**{f"student__{name}": value for name, value in parts.items()}))


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
    from dkd_trainer.engine.imitation import imitation_losses, student_options
    from dkd_trainer.engine.transfer import relative_error

    training = prepare(make_settings(imitation__guidance=[3.0, 6.0]))
    (batch,) = training.read_step(3)
    assert (batch.guidance >= 3).all() and (batch.guidance <= 6).all() and batch.guidance.std() > 0

    def mix(options):
        prompted = teacher.predict(batch.noisy, batch.t, batch.context, options)
        empty = teacher.predict(batch.noisy, batch.t, batch.empty.expand_as(batch.context), options)
        return empty + batch.guidance.view(-1, 1, 1, 1) * (prompted - empty)

    expected = relative_error(mix(student_options(training.student, batch.budget)), mix({}))
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


def test_bf16_trains_the_same_student_to_its_precision(prepare, make_settings):
    losses = []
    for precision in ("fp32", "bf16"):
        training = prepare(make_settings(train__precision=precision))
        for step in (0, 3):
            training.take_step(step, training.read_step(step))
            losses.append(training.losses)
        assert all(p.dtype == torch.float32 for p in training.parameters)
    assert losses[0] != losses[2]
    for full, half in ((losses[0], losses[2]), (losses[1], losses[3])):
        assert half == pytest.approx(full, rel=0.1)


def test_without_averaging_the_file_holds_the_last_weights(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import Training
    from dkd_trainer.engine.processes import Processes

    for ema, same in ((0.0, True), (0.9, False)):
        settings = make_settings(f"ema{ema}", train__ema=ema)
        training = Training(teacher, corpus, settings, Processes(settings.train))
        training.run()
        saved = load_student(settings.out).named_weights()
        last = {name: t.half().float() for name, t in training.student.named_weights().items()}
        assert all(torch.equal(saved[name], last[name]) for name in saved) == same


def test_learning_rates_warm_up_and_fall_in_each_stage():
    from dkd_trainer.engine.stages import Stage
    from dkd_trainer.settings import TransferSettings

    cosine = Stage("transfer", 100, TransferSettings(steps=100, rate=0.5, warmup=10))
    constant = Stage("transfer", 100, TransferSettings(steps=100, rate=0.5, warmup=10, schedule="constant"))
    assert cosine.rate(100) == constant.rate(100) == pytest.approx(0.05)
    assert cosine.rate(110) == constant.rate(110) == constant.rate(199) == pytest.approx(0.5)
    assert cosine.rate(199) < 0.02
    assert Stage("transfer", 0, TransferSettings(steps=9, rate=0.5, warmup=0)).rate(0) == pytest.approx(0.5)


def test_a_batch_that_cannot_be_shared_out_is_refused(prepare, make_settings):
    with pytest.raises(ValueError, match="'train.batch' is 6, expected a multiple of 4"):
        prepare(make_settings(train__batch=6, train__accumulation=4))


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


def test_the_trunk_is_left_as_it_was(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student

    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    train_student(teacher, corpus, make_settings(imitation__blocks=0.5, train__checkpointing=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.unet.state_dict().items())


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
