"""A training stops and goes on to the bit, and whatever happens keeps what it has."""

import json
import os
import signal

import pytest
import torch
from conftest import read_journal

from dha.checkpoint import load_student

ALL_TERMS = {"blocks": 0.5, "attention": 0.5, "noise": [0.5, 1.0]}


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


def test_a_second_sigterm_does_not_end_a_run_that_is_about_to_save_but_a_second_sigint_does():
    from dkd_trainer.engine.state import StopRequest

    def end_at_once(number, _frame):
        raise InterruptedError(number)

    before = {number: signal.signal(number, end_at_once) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with StopRequest() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(InterruptedError):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(InterruptedError):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_at_sheet(monkeypatch, number):
    """Let the sheet of that number end the run as a kill does: nothing is cleaned up."""
    from dkd_trainer.engine.sheets import Examination

    draw, drawn = Examination.draw_sheet, []

    def draw_or_die(self, student):
        drawn.append(student)
        if len(drawn) == number:
            raise SystemExit
        return draw(self, student)

    monkeypatch.setattr(Examination, "draw_sheet", draw_or_die)


def test_a_run_that_is_killed_over_its_sheets_has_saved_and_looks_at_the_last_step_again(
    teacher, corpus, make_settings, monkeypatch
):
    from dkd_trainer.engine.loop import train_student

    settings = make_settings(watch__validate_every=2, watch__sheet_every=2, watch__pictures=1)
    for sheet, state in ((1, 2), (2, 6)):  # its first; after it went on the last, of steps 4 and 6
        with monkeypatch.context() as patched:
            kill_at_sheet(patched, sheet)
            with pytest.raises(SystemExit):
                train_student(teacher, corpus, settings)
        assert max(settings.work.glob("state-*.pt")).name == f"state-{state:08d}.pt" and not settings.out.exists()
    train_student(teacher, corpus, settings)
    journal = read_journal(settings)
    assert [entry["step"] for entry in journal if entry["event"] == "sheet"] == [4, 6]
    last = [entry for entry in journal if entry["event"] == "validation"][-1]
    record = json.loads(settings.out.with_suffix(".json").read_text())
    assert last["step"] == 6 and record["validation"] == last["errors"]


def test_a_state_of_other_settings_is_not_continued(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student

    train_student(teacher, corpus, make_settings(transfer__steps=1, imitation__steps=0))
    with pytest.raises(ValueError, match="transfer.steps was 1, is 2"):
        train_student(teacher, corpus, make_settings(transfer__steps=2, imitation__steps=0))


def test_a_state_of_other_pairs_is_not_continued(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student

    train_student(teacher, corpus, make_settings(transfer__steps=1, imitation__steps=0))
    fewer = type(corpus)({"latents": corpus.latents[:6], "context": corpus.context[:6], "empty": corpus.empty})
    with pytest.raises(ValueError, match="pairs was '8 in memory', is '6 in memory'"):
        train_student(teacher, fewer, make_settings(transfer__steps=1, imitation__steps=0))


@pytest.mark.parametrize("part", ["unet", "text", "vae"])
def test_a_state_of_another_teacher_is_not_continued(teacher, corpus, make_settings, monkeypatch, part):
    """Also where only the prompts' attention, the text encoder or the VAE is another one."""
    from dkd_trainer.engine.loop import train_student

    train_student(teacher, corpus, make_settings(transfer__steps=1, imitation__steps=0))
    found = getattr(teacher, f"{part}_fingerprint")
    monkeypatch.setitem(teacher.__dict__, f"{part}_fingerprint", "0123")
    with pytest.raises(ValueError, match=f"weights.{part} was '{found}', is '0123'"):
        train_student(teacher, corpus, make_settings(transfer__steps=1, imitation__steps=0))


def test_a_state_goes_on_that_was_saved_before_there_was_a_setting(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student

    settings = make_settings(transfer__steps=1, imitation__steps=0)
    train_student(teacher, corpus, settings)
    (file,) = settings.work.glob("state-*.pt")
    state = torch.load(file, weights_only=True)
    del state["run"]["train"]["timestep_shift"]
    torch.save(state, file)
    train_student(teacher, corpus, settings)
    with pytest.raises(ValueError, match="train.timestep_shift was 1.0, is 2.0"):
        train_student(teacher, corpus, make_settings(transfer__steps=1, imitation__steps=0, train__timestep_shift=2.0))


def test_what_a_kill_left_half_written_is_gone_when_the_run_goes_on(teacher, corpus, make_settings):
    from dkd_trainer.engine.loop import train_student

    settings = make_settings(transfer__steps=1, imitation__steps=0)
    settings.work.mkdir(parents=True)
    (settings.work / "state-00000001.partial").write_bytes(b"half")
    train_student(teacher, corpus, settings)
    assert not list(settings.work.glob("*.partial"))


def test_a_loss_that_is_no_number_stops_the_training_before_it_spoils_the_state(
    teacher, corpus, make_settings, monkeypatch
):
    from dkd_trainer.engine import stages
    from dkd_trainer.engine.loop import train_student

    imitate = stages.imitation_losses

    def spoil(*arguments, **named):
        return {name: value * float("nan") for name, value in imitate(*arguments, **named).items()}

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


def test_an_error_is_noted_once_whatever_the_number_of_processes(make_settings):
    from dkd_trainer.engine.occupancy import occupy
    from dkd_trainer.engine.processes import Processes

    settings = make_settings()
    for place in (0, 1):
        processes = Processes(settings.train)
        processes.place = place
        with pytest.raises(ValueError), occupy(settings.work, processes):
            raise ValueError("no pairs")
    assert [(entry["event"], entry["message"]) for entry in read_journal(settings)] == [("error", "no pairs")]
