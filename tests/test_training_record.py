"""DKD Training Record: a training is shown from what the trainer's own journal says, whatever became of the trainer."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from dkd_trainer.engine.journal import Journal

STAGES = [{"name": "transfer", "first": 0, "steps": 6}, {"name": "imitation", "first": 6, "steps": 4}]


@pytest.fixture
def folders(studio):
    """The folders where trainings are looked for: models/dha and output/dkd."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("dha")[0]), Path(folder_paths.get_output_directory()) / "dkd"


def write_training(folder: Path, steps: int = 10, end: str = "") -> Journal:
    """A training of ten steps that came to `steps`, with samples at every fourth, in its trainer's own words."""
    (folder / "sheets").mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    journal.write("start", step=0, steps=10, stages=STAGES)
    for step in range(1, steps + 1):
        stage, pace = ("transfer" if step <= 6 else "imitation"), {"images_per_second": 2.0, "seconds_left": 10 - step}
        journal.write("step", step=step, stage=stage, losses={"output": 1 / step}, **pace)
        if step % 4 == 0:
            Image.new("RGB", (64, 96), (step * 20, 0, 0)).save(folder / "sheets" / f"{step}.png")
            journal.write("sheet", step=step, file=f"sheets/{step}.png")
    if end:
        journal.write(end, step=steps, message="memory")
    return journal


def look(studio, training: str):
    """Curve, samples and report."""
    curve, sheet, report = studio.host.call("DKDTrainingRecord", training=training)
    return curve, sheet, json.loads(report)


def list_choices(studio) -> list[str]:
    node = studio.host.nodes.NODE_CLASS_MAPPINGS["DKDTrainingRecord"]
    return node.INPUT_TYPES()["required"]["training"][1]["options"]


def test_a_training_of_the_shell_is_shown_after_its_end(studio, folders):
    write_training(folders[0] / "shell.work", end="end")
    record = {"command": "python -m dkd_trainer --out secret", "steps": 10, "pairs": 24, "seconds": 5.0}
    (folders[0] / "shell.json").write_text(json.dumps(record))
    curve, sheet, report = look(studio, "shell")
    assert curve.shape == (1, 540, 960, 3) and sheet.shape == (1, 96, 64, 3)
    assert sheet[0, 0, 0, 0].item() == pytest.approx(160 / 255), "the newest samples"
    assert report["state"] == "finished" and report["pairs"] == 24 and "command" not in report


@pytest.mark.parametrize(("end", "state"), [("", "running, or killed"), ("stop", "stopped"), ("error", "failed")])
def test_a_training_that_did_not_end_well_is_shown_as_far_as_it_came(studio, folders, end, state):
    write_training(folders[1] / f"half{end}" / "0123", steps=5, end=end)
    _, _, report = look(studio, f"half{end}/0123")
    assert (report["state"], report["step"], report["steps"]) == (state, 5, 10)


def test_a_running_training_is_shown_anew_each_time(studio, folders):
    journal = write_training(folders[0] / "running.work", steps=2)
    node = studio.host.nodes.NODE_CLASS_MAPPINGS["DKDTrainingRecord"]
    before, first = node.fingerprint_inputs(training="running"), look(studio, "running")
    time.sleep(0.02)
    journal.write("step", step=3, stage="transfer", losses={"output": 5.0}, images_per_second=1.0, seconds_left=7)
    assert node.fingerprint_inputs(training="running") != before
    second = look(studio, "running")
    assert second[2]["step"] == 3 and not second[0].equal(first[0])


def test_a_training_of_a_control_is_shown_with_its_errors_by_band(studio, module, teacher, corpus):
    """As its trainer tells it, also before its end, when there is no record."""
    import folder_paths

    from dkd_trainer.control.settings import assemble_control
    from dkd_trainer.control.training import train_control

    out = Path(folder_paths.get_folder_paths("dha_control")[0]) / "steer.safetensors"
    values = {"control.rank": 4, "control.steps": 2, "train.batch": 2, "train.device": "cpu", "data.size": 128}
    values |= {"watch.validate_every": 1, "watch.sheet_every": 2, "watch.log_every": 1, "watch.pictures": 1}
    train_control(teacher, corpus, assemble_control(overrides={**values, "output.file": str(out)}.items()))
    curve, sheet, report = look(studio, "steer (control)")
    assert report["state"] == "finished" and report["pairs"] == 8 and sheet.shape == (1, 4 * 128, 128, 3)
    out.with_suffix(".json").unlink()
    unfinished = look(studio, "steer (control)")[2]
    assert unfinished["validation"] == report["validation"] and curve.equal(look(studio, "steer (control)")[0])
    rows = dict(module("training_record").tabulate(unfinished))
    assert [*rows][-7:] == [
        f"held-out error, {name}"
        for name in ("0-100", "100-300", "300-600", "600-1000", "band", "steered", "unsteered")
    ]
    assert float(rows["held-out error, 0-100"]) == pytest.approx(report["validation"]["0-100"], abs=1e-4)
    progress = module("train_journal").read_progress(out.parent / "steer.work" / "journal.jsonl")
    steered, unsteered = (report["validation"][name] for name in ("steered", "unsteered"))
    assert [step for step, _ in progress.errors] == [1, 2] and progress.errors[-1][1] == steered / unsteered
    assert set(progress.losses) == {"control noise", "control band"}


def test_the_newest_training_is_offered_first(studio, folders):
    write_training(folders[0] / "older.work")
    time.sleep(0.02)
    write_training(folders[1] / "newer" / "abcd")
    choices = list_choices(studio)
    assert choices[0] == "newer/abcd" and "older" in choices


def test_of_two_trainings_with_one_name_the_newest_is_shown(studio, folders, tmp_path, monkeypatch):
    import folder_paths

    more = folder_paths.get_folder_paths("dha") + [str(tmp_path)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "dha", (more, {".safetensors"}))
    write_training(folders[0] / "twice.work", steps=3)
    time.sleep(0.02)
    write_training(tmp_path / "twice.work", steps=7)
    assert look(studio, "twice")[2]["step"] == 7 and list_choices(studio).count("twice") == 1
    time.sleep(0.02)
    Journal(folders[0] / "twice.work" / "journal.jsonl").write("stop", step=4)
    assert look(studio, "twice")[2]["state"] == "stopped"


def test_a_training_that_is_deleted_meanwhile_is_not_offered(studio, folders):
    """A link that leads nowhere is found and cannot be looked at, as a journal in that moment."""
    gone = folders[0] / "vanishing.work"
    gone.mkdir()
    (gone / "journal.jsonl").symlink_to(gone / "nothing")
    assert "vanishing" not in list_choices(studio)


def test_a_training_that_is_gone_is_explained(studio):
    with pytest.raises(ValueError, match="no training 'gone'.*press R"):
        look(studio, "gone")
