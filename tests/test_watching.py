"""A training is seen while it runs, on pairs that it does not learn from, and leaves its record."""

import json

import pytest
from conftest import look_in_parts, read_journal


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
    counts = [events.count(name) for name in ("validation", "sheet", "save")]
    assert counts == [2, 1, 4], "the last step is saved before it is looked at, and with what was found"
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


@pytest.mark.parametrize("batch,accumulation,most", [(1, 1, 2), (3, 1, 3), (4, 2, 2)])
def test_looking_at_a_student_takes_no_more_pictures_at_a_time_than_training_it(
    teacher, corpus, prepare, make_settings, monkeypatch, batch, accumulation, most
):
    """A picture is drawn with its prompt and without; what is found does not depend on how many they are."""
    watch = {"watch__validate_every": 1, "watch__sheet_every": 1, "watch__pairs": 4, "watch__pictures": 3}
    settings = make_settings(train__batch=batch, train__accumulation=accumulation, **watch)
    training, sizes = prepare(settings, held_out=corpus), []
    predict = type(teacher).predict

    def count(self, latents, *args):
        sizes.append(len(latents))
        return predict(self, latents, *args)

    with monkeypatch.context() as patched:
        patched.setattr(type(teacher), "predict", count)
        training.examination.measure_errors(training.average)
        assert max(sizes) == min(batch // accumulation, 4)
        training.examination.draw_sheet(training.average)
    assert max(sizes) == most
    look_in_parts(training.examination, training.average)
