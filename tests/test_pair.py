"""A student of a steered teacher: both sides see the control, the branch runs with DHA, a run goes on to the bit."""

import json
import os
import signal

import pytest
import torch
from conftest import TRAINED, look_in_parts, make_student, read_journal, relate
from control_files import open_branch

from dha.checkpoint import load_student
from dha.control_file import ControlConfig, save_control

TINY = {
    "student.levels": [0],
    "student.memory": 4,
    "student.rank": 4,
    "student.router_width": 16,
    "student.local": 0,
    "transfer.steps": 3,
    "imitation.steps": 3,
    "train.batch": 2,
    "train.device": "cpu",
    "data.size": 128,
    "output.save_every": 2,
    "watch.validate_every": 0,
    "watch.sheet_every": 0,
    "watch.log_every": 1,
}


@pytest.fixture(scope="module")
def controls(teacher, tmp_path_factory):
    """Two control files as if trained: each steers visibly, in its own way."""
    return [write_control(teacher, tmp_path_factory.mktemp("controls"), band) for band in ("mini", "high")]


def write_control(teacher, folder, band: str, seed: int = 0) -> str:
    from dkd_trainer.control.branch import TrainedBranch

    torch.manual_seed(seed)
    branch = TrainedBranch(teacher, ControlConfig(band, 4))
    open_branch(branch, seed)
    with torch.no_grad():
        for name, weight in branch.weights.items():
            if name.endswith("/up"):
                weight.normal_(std=0.02)
    path = folder / f"{band}-{seed}.safetensors"
    save_control(path, branch.to_file(teacher, {}))
    return str(path)


@pytest.fixture
def brief(controls):
    return {**TINY, "pair.controls": controls}


@pytest.fixture
def kind():
    from dkd_trainer.control.pair import PairTraining

    return PairTraining


def measure(training, step, terms=("output",), student=None):
    """The loss terms of a step's batch in the stage that it belongs to."""
    from dkd_trainer.engine.stages import find_stage

    (batch,) = training.read_step(step)
    stage = find_stage(training.stages, step)
    return batch, stage.measure(training.teacher, student or training.student, batch, False)


def test_the_target_is_the_steered_teachers_prediction_and_the_student_is_steered_alike(make_settings, prepare):
    """With all tokens as keys the student is its teacher, and only a control on one side alone could be seen."""
    from dha.config import DHAConfig
    from dha.student import Student
    from dkd_trainer.engine.imitation import imitation_losses

    training = prepare(make_settings(student__token_budget=0.1))
    student = Student(DHAConfig(levels=(0,), token_budget=1.0), training.teacher.architecture)
    (batch,) = training.read_step(3)
    stage = training.stages[1]
    whole = type(batch)(**{**vars(batch), "budget": 1.0})
    assert stage.measure(training.teacher, student, whole, False)["output"] < 1e-9
    unsteered = imitation_losses(training.teacher, training.student, batch)["output"]
    steered = stage.measure(training.teacher, training.student, batch, False)["output"]
    assert abs(steered / unsteered - 1) > 1e-3, "the control is not seen"


def test_each_step_has_one_of_the_controls_in_its_turn(make_settings, prepare):
    training = prepare(make_settings())
    found = [training.controls.choose(training.read_step(step)[0]).band for step in range(4)]
    assert found in (["mini", "high"] * 2, ["high", "mini"] * 2)


def test_stage_one_learns_the_branchs_layers_from_the_steered_teachers_inputs(make_settings, prepare):
    from dkd_trainer.engine.transfer import transfer_losses

    alone, both = (prepare(make_settings(pair__branch=branch)) for branch in (False, True))
    batch, losses = measure(alone, 0)
    inputs = (batch.noisy, batch.t, batch.context, batch.budget, batch.seed)
    both.student.load_state_dict(alone.student.state_dict())
    plain = transfer_losses(alone.teacher, alone.student, *inputs)
    options, own = both.controls.watch(both.student, batch)
    steered = transfer_losses(both.teacher, both.student, *inputs, options)
    decoder = "output_blocks.11.1.transformer_blocks.0.attn1"
    assert abs(steered[decoder] / plain[decoder] - 1) > 1e-3, "the control does not reach the decoder's inputs"
    encoder = "input_blocks.2.1.transformer_blocks.0.attn1"
    assert torch.equal(steered[encoder], plain[encoder]), "the UNet's encoder is not steered"
    assert {name for name in own if not name.endswith("/routing")} == {
        f"control/input_blocks.{n}.1.transformer_blocks.0.attn1" for n in (1, 2)
    }
    assert abs(own[f"control/{encoder}"] / plain[encoder] - 1) > 1e-3, "the branch's layer has inputs of its own"
    _, together = measure(both, 0)
    assert not torch.equal(together["attention"], losses["attention"])
    sum(own.values()).backward()
    taught = {name.partition(".")[0] for name, p in both.student.sites.named_parameters() if p.grad is not None}
    assert taught == {"input_1", "input_2"}


def test_the_branch_runs_with_the_student_unless_it_is_told_not_to(make_settings, prepare):
    terms = {"imitation__control": 0.5, "imitation__control_blocks": 0.5}
    training = prepare(make_settings(**terms))
    batch, losses = measure(training, 4)
    assert losses["control"] > 1e-7 and losses["control_blocks"] > 1e-7
    (losses["control"] + losses["control_blocks"]).backward()
    assert training.student.sites["input_1"].memory.tokens.grad.abs().sum() > 0
    assert training.student.sites["output_9"].memory.tokens.grad is None, "a branch has no decoder"
    training.controls.accelerate = False
    inputs = (batch.noisy, batch.t, batch.context)
    _, _, losses = training.controls.steer(batch, inputs, [{}], {"control"}, False)
    assert losses["control"] == 0


def test_what_the_control_says_of_the_teacher_is_found_once_for_all_grids(make_settings, prepare, monkeypatch):
    training = prepare(make_settings())
    find, calls = training.controls.find_pairs, []
    monkeypatch.setattr(training.controls, "find_pairs", lambda *parts: calls.append(parts) or find(*parts))
    measure(training, 4)
    assert [len(parts) for parts in calls] == [2, 3, 3], "the teacher's, and one with the student for each grid"


def test_the_controls_terms_need_a_branch_that_runs_with_the_student(make_settings, prepare):
    for changes in ({"pair__branch": False}, {"pair__controls": []}):
        with pytest.raises(ValueError, match="imitation.control.*give --control and pair.branch=true"):
            prepare(make_settings(imitation__control=0.5, **changes))


def test_the_official_pair_learns_by_the_published_control_terms(make_settings, prepare):
    parts = {"mode": "official", "levels": [0, 1, 2, 3], "memory": 0, "rank": 0, "router_width": 0}
    changes = {f"student__{name}": value for name, value in parts.items()}
    training = prepare(make_settings(preset="official", transfer__steps=0, **changes))
    _, losses = measure(training, 0)
    assert losses.keys() == {"output", "noise", "blocks", "maps", "routing", "control", "control_blocks"}
    weights = training.balance.weigh(training.stages[0], 0)
    assert (weights["control"], weights["control_blocks"], weights["noise"]) == (0.63, 0.03, 5.0)
    assert losses["control"] > 0 and losses["control_blocks"] > 0


def test_guided_predictions_are_steered_in_both_halves(make_settings, prepare):
    training = prepare(make_settings(imitation__guidance=[3.0, 3.0]))
    batch, losses = measure(training, 3)
    assert len(batch) == 2 and 0 < losses["output"] < 1


def test_checkpointing_changes_no_gradient(make_settings, prepare):
    training = prepare(make_settings(imitation__control=0.5, imitation__control_blocks=0.5))
    (batch,) = training.read_step(4)
    gradients = []
    for checkpointing in (False, True):
        training.student.zero_grad()
        sum(training.stages[1].measure(training.teacher, training.student, batch, checkpointing).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in training.parameters if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_stopped_training_goes_on_to_the_bit(make_settings, prepare, monkeypatch):
    from dkd_trainer.control.pair import PairTraining
    from dkd_trainer.engine.state import TrainingStopped

    changes = {"imitation__control": 0.1, "train__batch": 4, "train__accumulation": 2}
    whole, parts = make_settings("whole", **changes), make_settings("parts", **changes)
    before = {name: tensor.clone() for name, tensor in prepare(whole).teacher.unet.state_dict().items()}
    training = prepare(whole)
    training.run()
    take_step = PairTraining.take_step

    def take_and_stop(training, step, *rest):
        if step in (1, 3):  # the signal is seen at the next step: a stage's last one, and within a stage
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(training, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(PairTraining, "take_step", take_and_stop)
        for stopped_at in (3, 5):
            with pytest.raises(TrainingStopped, match=f"step {stopped_at}"):
                prepare(parts).run()
    prepare(parts).run()
    first, second = (load_student(settings.out).named_weights() for settings in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [entry["step"] for entry in read_journal(parts) if entry["event"] == "step"] == list(range(1, 7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.teacher.unet.state_dict().items())


def test_a_state_of_other_controls_is_not_continued(teacher, make_settings, prepare, controls, tmp_path):
    steps = {"transfer__steps": 1, "imitation__steps": 0}
    prepare(make_settings(**steps)).run()
    other = [controls[0], write_control(teacher, tmp_path, "high", seed=1)]
    with pytest.raises(ValueError, match=r"pair.controls was .*, is "):
        prepare(make_settings(**steps, pair__controls=other)).run()
    with pytest.raises(ValueError, match="pair.branch was True, is False"):
        prepare(make_settings(**steps, pair__branch=False)).run()


def test_errors_and_sheets_are_of_the_steered_pair(make_settings, prepare, corpus):
    settings = make_settings(imitation__steps=0, transfer__steps=1, watch__sheet_every=1, watch__pictures=2)
    training = prepare(settings, corpus)
    training.run()
    from PIL import Image

    assert Image.open(settings.work / "sheets" / "00000001.png").size == (2 * 128, 2 * 3 * 128)
    examination, student = training.examination, make_student(training.teacher.architecture, config=TRAINED)
    steered = examination.measure_errors(student)
    plain = super(type(examination), examination)
    examination.list_views = plain.list_views
    assert (
        relate(torch.tensor(list(steered.values())), torch.tensor(list(examination.measure_errors(student).values())))
        > 1e-3
    )


def test_what_is_seen_of_a_pair_does_not_depend_on_the_parts(make_settings, prepare, corpus):
    settings = make_settings(train__batch=3, watch__validate_every=1, watch__pairs=4, watch__pictures=3)
    training = prepare(settings, corpus)
    look_in_parts(training.examination, make_student(training.teacher.architecture, config=TRAINED))


def test_a_finished_student_says_which_controls_it_saw_and_names_no_folder(make_settings, prepare, controls):
    from dha.checkpoint import read_metadata

    settings = make_settings(transfer__steps=1, imitation__steps=0)
    prepare(settings).run()
    training = json.loads(read_metadata(settings.out)["training"])
    assert [control["band"] for control in training["run"]["pair"]["controls"]] == ["mini", "high"]
    assert str(settings.out.parent) not in json.dumps(training)


def test_a_training_begins_with_a_students_weights(teacher, corpus, make_settings, prepare, tmp_path):
    first = make_settings("first", transfer__steps=2, imitation__steps=0)
    prepare(first).run()
    settings = make_settings("second", start=str(first.out), student__token_budget=0.2)
    training = prepare(settings)
    begun = load_student(first.out).named_weights()
    for student in (training.student, training.average):
        found = student.named_weights()
        assert all(torch.equal(found[name], begun[name]) for name in begun)
    assert training.student.config.token_budget == 0.2 and all(p.requires_grad for p in training.parameters)
    assert training.describe()["start"] == training.origin != ""
    with pytest.raises(ValueError, match="first.safetensors cannot start .*rank was 4, is 8"):
        prepare(make_settings("third", start=str(first.out), student__rank=8))
    with pytest.raises(ValueError, match="'start' is .*does not exist"):
        prepare(make_settings("third", start=str(tmp_path / "absent.safetensors")))


def test_two_controls_of_one_band_are_refused(make_settings, prepare, controls):
    with pytest.raises(ValueError, match="both of band mini"):
        prepare(make_settings(pair__controls=[controls[0]] * 2))


def test_the_dry_run_tries_the_pair(make_settings, teacher, corpus, monkeypatch, capsys):
    from dkd_trainer.control.pair import PairTraining
    from dkd_trainer.data.source import Listing
    from dkd_trainer.engine import rehearsal
    from dkd_trainer.engine.processes import Processes

    monkeypatch.setattr(rehearsal, "list_source", lambda *_: Listing("in memory", "", list(range(len(corpus)))))
    monkeypatch.setattr(rehearsal, "encode_pairs", lambda *_: corpus)
    settings = make_settings(imitation__control=0.5)
    rehearsal.rehearse(teacher, settings, Processes(settings.train), PairTraining)
    assert "imitation: 3 steps" in (told := capsys.readouterr().out) and "control 0." in told
    assert not settings.work.exists()
