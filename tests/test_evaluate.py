"""The evaluation on the real mini teacher: what it measures, what it keeps, what it compares, what it writes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relate
from PIL import Image

from dha.config import DHAConfig
from dkd_trainer.evidence.attention_cost import count_cost, count_full, match_budget, match_sparsity

pytest.importorskip("efficientnet_lite_pytorch", reason="picture features come with the extra `train`")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten small pictures with prompts."""
    folder = tmp_path_factory.mktemp("held-out")
    rng = np.random.default_rng(0)
    for i in range(10):
        grid = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(grid).resize((64, 64), Image.NEAREST).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture
def arguments(studio, pairs, out):
    return [
        *("--teacher", str(studio.checkpoint), "--held-out", str(pairs), "--out", str(out), "--device", "cpu"),
        *("--size", "64", "--count", "5", "--steps", "2", "--rounds", "0"),
    ]


@pytest.fixture
def student(studio):
    return str(studio.write_student("evaluated"))


def read(arguments, *more):
    from dkd_trainer.evidence.evaluate import read_arguments

    return read_arguments([*arguments, *more])


def test_a_stopped_evaluation_goes_on_with_what_was_measured(arguments, student, out, monkeypatch):
    from dkd_trainer.evidence import comparison, evaluate

    args = read(arguments, "--students", student, "--no-peers")
    measure, names = comparison.measure_subject, []

    def stop_at_the_student(teacher, subject, *more):
        if subject.name.startswith("evaluated"):
            raise KeyboardInterrupt
        names.append(subject.name)
        return measure(teacher, subject, *more)

    monkeypatch.setattr(comparison, "measure_subject", stop_at_the_student)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(args)
    assert len(names) == 5 and not (out / "evaluation.json").exists()
    monkeypatch.setattr(comparison, "measure_subject", lambda t, s, *more: names.append(s.name) or measure(t, s, *more))
    evaluate.evaluate(args)
    assert len(names) == 6 and names[-1].startswith("evaluated")
    first = json.loads((out / "evaluation.json").read_text())["rows"]
    evaluate.evaluate(args)
    assert len(names) == 6
    assert json.loads((out / "evaluation.json").read_text())["rows"] == first
    evaluate.evaluate(read(arguments, "--students", student, "--no-peers", "--cfg", "2"))
    assert len(names) == 12


def test_rows_put_harmless_changes_below_another_seed(arguments, student, out):
    from dkd_trainer.evidence import evaluate

    evaluate.evaluate(read(arguments, "--students", student, "--no-peers"))
    document = json.loads((out / "evaluation.json").read_text())
    rows = document["rows"]
    assert 0 < rows["teacher, bf16"]["error mean"] < 0.1 * rows["evaluated, 12.5 % of the keys"]["error mean"]
    for figure in ("latent_error", "perceptual", "dct_low", "dct_high"):
        assert 0 < rows["teacher, bf16"][figure] < rows["teacher, another seed"][figure]
    assert rows["teacher, bf16"]["psnr"] > rows["teacher, another seed"]["psnr"]
    assert "error mean" not in rows["teacher, another seed"] and rows["teacher"]["kid_change_x1e3"] == 0
    assert rows["evaluated, 12.5 % of the keys"]["kid_change_x1e3_error"] > 0
    assert {"command", "commit", "hardware", "torch"} <= set(document)
    settings = document["settings"]
    assert (settings["sampler"], settings["steps"], settings["cfg"], settings["precision"]) == ("Euler", 2, 4.0, "fp32")


def test_a_lower_precision_is_that_of_every_subject(teacher):
    """bf16 by autocast errs as the teacher in bf16 does, and that one is as it was."""
    from dkd_trainer.evidence.peers import strided
    from dkd_trainer.evidence.students import spend_budget, training_free
    from dkd_trainer.evidence.subject import Running, Subject

    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, teacher.architecture.context)
    for subject in (Subject("teacher", ""), training_free((0,), spend_budget(0.25)), strided((0,), 2)):
        exact, lower = (
            Running(teacher, subject, 16, precision).predict(x, torch.tensor([400, 700]), context)
            for precision in ("fp32", "bf16")
        )
        assert lower.dtype == torch.float32 and 1e-4 < relate(lower, exact) < 0.05
    cast = Subject("teacher, bf16", "", dtype=torch.bfloat16)
    found = [Running(teacher, cast, 16, p).predict(x, torch.tensor([400, 700]), context) for p in ("fp32", "bf16")]
    assert torch.equal(*found)


@pytest.fixture
def clock(monkeypatch):
    """A clock of the stopwatch's that only predictions set forward, by the seconds of a subject's name."""
    from dha import stopwatch
    from dkd_trainer.evidence.subject import Running

    now, seconds, predict = [0.0], {"teacher": 4.0}, Running.predict

    def spend(running, *inputs):
        now[0] += seconds.get(running.subject.name, 4.0)
        return predict(running, *inputs)

    monkeypatch.setattr(Running, "predict", spend)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return seconds


def test_what_follows_a_subject_is_timed_by_its_share_of_the_sampling(teacher, clock):
    """Half of it, then two fifths, then the teacher: the mean of their seconds, and of their pairs of query and key."""
    from dkd_trainer.evidence.peers import strided
    from dkd_trainer.evidence.stopwatch import time_subjects
    from dkd_trainer.evidence.subject import Subject

    short = strided((0,), 2)
    mixed = dataclasses.replace(short, name="mixed", end=0.5, then=Subject("rest", "", end=0.9))
    clock.update({"mixed": 1.0, "rest": 2.0})
    times = time_subjects(teacher, [Subject("teacher", "teacher"), short, mixed], 64, 2, 2)
    assert times["mixed"]["relative"] == pytest.approx((0.5 * 1 + 0.4 * 2 + 0.1 * 4) / 4)
    assert times["mixed"]["attention_pairs"] == pytest.approx((times[short.name]["attention_pairs"] + 1) / 2)


def test_behind_its_end_a_subject_is_the_teacher_sample_by_sample(studio, teacher):
    from dkd_trainer.evidence.students import spend_budget, training_free
    from dkd_trainer.evidence.subject import Running, Subject

    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 128, generator=generator)
    subjects = [Subject("teacher", "t"), *(training_free((0,), s(0.125)) for s in (spend_budget, half_way))]
    t = torch.tensor([900, 400, 600])
    with torch.inference_mode():
        plain, ours, ended = (Running(teacher, subject, 8).predict(latents, t, context) for subject in subjects)
        late = Running(teacher, subjects[2], 8).predict(latents[1:2], t[1:2], context[1:2])
    assert torch.equal(ended[[0, 2]], ours[[0, 2]]) and torch.equal(ended[1], plain[1])
    assert not torch.equal(ours[1], plain[1]) and relate(late, plain[1:2]) < 1e-5


@pytest.mark.parametrize("end", ["0", "1", "1.5", "half"])
def test_an_end_outside_of_the_schedule_is_refused_before_anything_is_measured(arguments, end, capsys):
    with pytest.raises(SystemExit):
        read(arguments, "--ends", "0.5", end)
    assert "expected a share of the schedule between 0 and 1" in capsys.readouterr().err


def half_way(budget):
    from dkd_trainer.evidence.students import spend_until

    return spend_until(budget, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.1", "expected a share of the keys"),
        ("0.1:0.5,0.2:0.4", "expected ends that rise"),
        ("2:0.5", "expected a share of the keys"),
        ("0.1:0", "expected a share of the schedule"),
        ("0.1:0.5:bare", "expected SHARE:END or SHARE:END:plain"),
    ],
)
def test_stretches_that_make_no_sampling_are_refused(arguments, text, said, capsys):
    with pytest.raises(SystemExit):
        read(arguments, "--stretches", "0.1:0.5,0.2:1", text)
    assert said in capsys.readouterr().err


def test_stretches_are_rows_and_plain_ones_run_untrained(arguments, student, out):
    from dkd_trainer.evidence import evaluate

    given = ["0.125:0.7", "0.125:0.5,0.125:0.7:plain", "0.125:0.5:plain,0.125:0.7:plain"]
    evaluate.evaluate(read(arguments, "--students", student, "--no-peers", "--stretches", *given))
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    names = ["12.5 % until 70 %", "12.5 % until 50 %; 12.5 % until 70 %, plain"]
    names.append("12.5 % until 50 %, plain; 12.5 % until 70 %, plain")
    free, ours = ([rows[f"{kind}, {name}"] for name in names] for kind in ("DHA, training-free", "evaluated"))
    assert len({row["error mean"] for row in free}) == 1 == len({row["psnr"] for row in free})
    assert ours[2]["psnr"] == free[0]["psnr"] and len({row["error mean"] for row in ours}) == 3
    assert ours[1]["error 600-1000"] == ours[0]["error 600-1000"] != free[0]["error 600-1000"]
    assert all(row["error 100-300"] == 0 for row in (*free, *ours))


def test_presets_and_ends_are_rows_of_their_own(arguments, student, out):
    from dkd_trainer.evidence import evaluate

    more = ["--students", student, "--no-peers", "--ends", "0.5", "--presets", "--landmarks", "16", "--rounds", "1"]
    evaluate.evaluate(read(arguments, *more))
    document = json.loads((out / "evaluation.json").read_text())
    rows, times = document["rows"], document["timing"][0]["subjects"]
    for kind in ("DHA, training-free", "evaluated"):
        whole, half = f"{kind}, 12.5 % of the keys", f"{kind}, 12.5 % of the keys until 50 %"
        assert 0 < rows[half]["error mean"] < rows[whole]["error mean"] and rows[half]["error 0-100"] == 0
        assert times[half]["attention_pairs"] == pytest.approx((1 + times[whole]["attention_pairs"]) / 2)
        assert {f"{kind}, preset {name}" for name in ("quality", "balanced", "fast")} <= set(rows)
        assert rows[f"{kind}, preset fast"]["error 0-100"] > 0
    free = "DHA, training-free, 12.5 % of the keys"
    assert 0 < rows[f"{free}, 16 landmarks"]["error mean"] < rows[free]["error mean"], "64 are too many for 64 tokens"


def test_the_short_sheet_says_whose_difference_it_shows(arguments, student, out):
    from dkd_trainer.evidence import evaluate
    from dkd_trainer.evidence.kept import name_file

    evaluate.evaluate(read(arguments, "--students", student, "--no-peers", "--budgets", "0.125", "0.5"))
    text = (out / "evaluation.md").read_text()
    assert "difference of evaluated, 12.5 % of the keys to the teacher](evaluation-short.png)" in text
    assert f"evaluated.safetensors {name_file(Path(student))}" in text


def test_choosing_and_reporting_use_different_pairs(teacher, pairs, tmp_path):
    from dkd_trainer.data.source import DataError
    from dkd_trainer.evidence.held_out import open_held_out

    first, second = (open_held_out(pairs, teacher, tmp_path, 64, skip, 5) for skip in (0, 5))
    assert not set(first.prompts) & set(second.prompts) and first.identity != second.identity
    with pytest.raises(DataError, match="holds 10 usable pairs, expected 12"):
        open_held_out(pairs, teacher, tmp_path, 64, 6, 6)


def test_for_pictures_that_cannot_be_used_the_next_ones_come_in(teacher, pairs, tmp_path):
    from dkd_trainer.data.source import DataError
    from dkd_trainer.evidence.held_out import open_held_out

    folder, cache = tmp_path / "pairs", tmp_path / "cache"
    shutil.copytree(pairs, folder)
    for name in ("0.png", "1.png", "4.png"):
        (folder / name).write_bytes(b"broken")
    assert open_held_out(folder, teacher, cache, 64, 0, 5).prompts == [f"picture {i}" for i in (2, 3, 5, 6, 7)]
    with pytest.raises(DataError, match="holds 7 usable pairs, expected 8"):
        open_held_out(folder, teacher, cache, 64, 4, 4)


def predict(teacher, subject, seed=0):
    from dkd_trainer.evidence.subject import Running

    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    context = torch.randn(2, 77, teacher.architecture.context, generator=torch.Generator().manual_seed(2))
    running = Running(teacher, subject, 16)
    torch.manual_seed(seed)
    with torch.inference_mode():
        return running.predict(x, torch.tensor([400, 700]), context)


@pytest.mark.parametrize(
    ("node", "settings", "name"),
    [
        ("TomePatchModel", {"ratio": 0.5}, "ToMe, 50 % merged"),
        ("HyperTile", {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}, "HyperTile, 2x2 tiles"),
    ],
)
def test_core_nodes_as_peers_do_what_they_do_in_comfyui(studio, teacher, node, settings, name):
    from dkd_trainer.evidence.peers import list_peers
    from dkd_trainer.evidence.subject import Subject

    peer = next(subject for subject in list_peers((0,)) if subject.name == name)
    patched = studio.call(node, model=studio.model, **settings)
    by_node = Subject("node", "node", lambda *_: patched.model_options["transformer_options"])
    found = predict(teacher, peer)
    assert torch.equal(found, predict(teacher, by_node))
    assert relate(found, predict(teacher, Subject("teacher", "teacher"))) > 1e-3


def test_peers_that_keep_everything_are_the_teacher(teacher):
    from dkd_trainer.evidence import peers
    from dkd_trainer.evidence.subject import Subject

    expected = predict(teacher, Subject("teacher", "teacher"))
    for subject in (peers.strided((0, 1), 1), peers.pooled((0, 1), 1), peers.windowed((0, 1), 1)):
        assert relate(predict(teacher, subject), expected) < 1e-5
    for subject in (peers.strided((0,), 2), peers.pooled((0,), 2), peers.windowed((0,), 2), peers.removed((0,))):
        assert relate(predict(teacher, subject), expected) > 1e-3


def test_windows_refuse_a_size_that_they_cannot_cut(teacher):
    from dkd_trainer.evidence.peers import windowed

    with pytest.raises(ValueError, match="cannot be cut into 3x3"):
        predict(teacher, windowed((0,), 3))


def test_lower_precision_runs_on_a_copy(teacher):
    from dkd_trainer.evidence.subject import Subject

    before = next(teacher.unet.parameters()).dtype
    exact = predict(teacher, Subject("teacher", "teacher"))
    rounded = predict(teacher, Subject("bf16", "null", dtype=torch.bfloat16))
    assert 0 < relate(rounded, exact) < 0.1 and next(teacher.unet.parameters()).dtype == before


def test_changed_attributes_are_set_back_after_every_call(teacher):
    from dkd_trainer.evidence.subject import Subject

    path = "input_blocks.1.1.norm.num_groups"
    changed = predict(teacher, Subject("four groups", "x", attributes={path: 4}))
    assert relate(changed, predict(teacher, Subject("teacher", "teacher"))) > 1e-4
    assert teacher.unet.get_submodule("input_blocks.1.1.norm").num_groups == 32


def test_step_times_are_relative_to_the_first_subject_and_count_pairs(teacher):
    from dkd_trainer.evidence.peers import strided
    from dkd_trainer.evidence.stopwatch import time_subjects
    from dkd_trainer.evidence.subject import Subject

    times = time_subjects(teacher, [Subject("teacher", "teacher"), strided((0,), 2)], 64, 2, 2)
    first, second = times.values()
    assert first["relative"] == 1 and first["attention_pairs"] == 1 and first["seconds"] > 0
    # 5 of 16 self-attentions have 64 tokens, each with a quarter of the keys; 77 text tokens stay
    tokens = [64] * 5 + [16] * 5 + [4] * 5 + [1]
    whole = sum(n * (n + 77) for n in tokens)
    assert second["attention_pairs"] == pytest.approx((whole - 5 * 64 * 48) / whole)


def test_fewer_steps_count_as_a_share_of_the_samplings_time(teacher, clock):
    from dkd_trainer.evidence.peers import list_fewer_steps
    from dkd_trainer.evidence.stopwatch import time_subjects
    from dkd_trainer.evidence.subject import Subject

    fewer = list_fewer_steps(25)
    assert [subject.steps for subject in fewer] == [16, 12, 10, 8] and all(subject.is_teacher for subject in fewer)
    times = time_subjects(teacher, [Subject("teacher", "teacher"), fewer[0]], 64, 2, 2, sampling=25)
    assert times["teacher, 16 steps"]["attention_pairs"] == pytest.approx(0.64)
    assert times["teacher, 16 steps"]["relative"] == pytest.approx(0.64)


def test_official_is_given_the_sparsity_that_costs_as_much():
    student = DHAConfig(memory=8, rank=8, router_width=32)
    cost = count_cost(student, 16, 32)
    official = match_sparsity(DHAConfig(mode="official"), cost, 16, 32)
    richer = DHAConfig(mode="official", sparsity=official.sparsity + 1 / 256)
    assert count_cost(official, 16, 32) <= cost < count_cost(richer, 16, 32)
    free = match_budget(DHAConfig(), cost, 16, 32)
    assert count_cost(DHAConfig(), 16, 32) < count_cost(free, 16, 32) <= cost < count_full(256, 32)


def test_an_ablation_trains_and_measures_each_row_once(arguments, pairs, out, tmp_path, monkeypatch):
    from dkd_trainer.evidence import ablation

    more = ["--data", str(pairs), "--seconds", "0.001", "--only", "stages 1+2", "official, rate 1e-06"]
    # as large as the preset has them, the parts of a layer of 64 tokens would cost more than the teacher's
    small = ["--set", "train.batch=2", "--set", "student.memory=4", "--set", "student.rank=4"]
    cache = tmp_path / "encoded before"
    args = ablation.read_arguments([*arguments, *more, *small, "--set", f"data.cache={cache}"])
    train, trained = ablation.train_student, []
    monkeypatch.setattr(ablation, "train_student", lambda *parts: trained.append(parts[-1].out.name) or train(*parts))
    ablation.run_ablation(args)
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert len(trained) == 2 and rows["stages 1+2"]["train_steps"] == 2
    assert list(cache.glob("latents-*")), "what other runs have encoded"
    assert rows["official, rate 1e-06"]["attention_cost"] <= rows["stages 1+2"]["attention_cost"] < 1
    ablation.run_ablation(args)
    assert len(trained) == 2 and json.loads((out / "ablation.json").read_text())["rows"] == rows


def test_an_unknown_row_is_named(arguments, pairs):
    from dkd_trainer.evidence import ablation

    args = ablation.read_arguments([*arguments, "--data", str(pairs), "--only", "stage 9"])
    with pytest.raises(ValueError, match="no row 'stage 9'"):
        ablation.list_rows(args, DHAConfig(memory=8), 8, 32)


def test_every_row_is_a_run_that_the_trainer_takes(arguments, pairs):
    """Settings of all groups are valid, and those of a group differ from each other."""
    from dkd_trainer.engine.stages import list_stages
    from dkd_trainer.evidence import ablation

    args = ablation.read_arguments([*arguments, "--data", str(pairs), "--groups", "stages", "parts", "terms"])
    rows = ablation.list_rows(args, ablation.common_settings(args).student, 8, 32)
    runs = {row.name: ablation.row_settings(args, row) for row in rows}
    for row in rows:
        assert list_stages(runs[row.name]), row.name
    for family in ("parts", "terms"):
        kinds = [str(runs[row.name].describe_run()) for row in rows if row.family == family]
        assert len(set(kinds)) == len(kinds) > 4


def test_fp16_is_in_the_null_band_but_on_a_processor():
    from dkd_trainer.evidence.subject import list_null_band

    names = [[subject.name for subject in list_null_band(25, torch.device(kind))] for kind in ("cpu", "cuda")]
    assert names == [rest := ["teacher, bf16", "teacher, 20 steps", "teacher, another seed"], ["teacher, fp16", *rest]]


def test_what_was_kept_is_measured_anew_with_another_comfyui_or_other_code(monkeypatch, tmp_path):
    comfyui_version = pytest.importorskip("comfyui_version", reason="ComfyUI is not importable")
    from dkd_trainer.evidence import kept

    before = kept.name_code()
    with monkeypatch.context() as patched:
        patched.setattr(comfyui_version, "__version__", "0.0.1")
        assert kept.name_code() != before
    for name in [*kept.SOURCES, *kept.list_folder("dha"), *kept.list_folder("dkd_trainer/engine")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept.ROOT / name, tmp_path / name)
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    assert kept.name_code() == before
    trained = kept.name_training()
    sources = ("engine/imitation", "engine/attention", "host", "evidence/students")
    for name in (*(f"dkd_trainer/{name}.py" for name in sources), "dha/landmarks.py", "dha/planner.py"):
        with (tmp_path / name).open("a") as file:
            file.write("#")
        assert kept.name_code() != before, name
        before = kept.name_code()
    assert kept.name_training() != trained
