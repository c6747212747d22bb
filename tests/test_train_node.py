"""DKD Train in a real ComfyUI: what it learns from and refuses; a trainer that is stopped, killed or orphaned."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import relate
from PIL import Image
from test_refusal import SD15, build_model

from dha.checkpoint import load_student
from dkd_trainer.fields import SettingsError
from dkd_trainer.settings import assemble_settings, share_steps
from workflows.formats import fill_defaults
from workflows.graphs import CHECKPOINT, FOLDER, Picture, add_student, draw, node
from workflows.server import ServerError, find_comfyui, serve

ROOT = Path(__file__).resolve().parent.parent
LONG = {"data_folder": "pairs", "steps": 240, "batch": 1}


def write_pairs(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in ("red", "green", "blue", "yellow"):
        Image.new("RGB", (128, 128), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"{colour} picture")
    return folder


def train(name: str, **settings):
    """Node 5 trains, nodes 6 to 9 draw with its student."""
    graph = draw(CHECKPOINT, Picture("owl", steps=1))
    graph["7"]["inputs"]["model"] = add_student(graph, None, {"levels": "two finest"})
    models = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph["5"] = node("DKDTrain", **models, **{"name": name, "preset": "mini", **settings})
    graph["6"]["inputs"]["student"] = ["5", 0]
    return graph


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a ComfyUI with four pictures in its input folder."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if not (FOLDER / "models" / "checkpoints" / CHECKPOINT).is_file():
        pytest.skip(f"{CHECKPOINT} is not there")

    def build():
        base = tmp_path_factory.mktemp("comfyui")
        write_pairs(base / "input" / "pairs")
        return base, serve(find_comfyui(None), base)

    return build


@pytest.fixture(scope="module")
def server(start):
    base, starting = start()
    with starting as running:
        running.info, running.base = running.get("/object_info"), base
        yield running


def run(server, graph, act=None, after=1):
    """Run a graph, call `act` once when the training has come to step `after`; returns the outcome and the progress."""
    seen = []

    def note(key, value, total):
        if key == "5" and total:
            seen.append((value, total))
            if act and value >= after:
                acts.pop()() if acts else None

    acts = [act] if act else []
    return server.run(fill_defaults(graph, server.info), on_progress=note), seen


def find_trainers(server) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if "dkd_trainer" in child.cmdline()]


def find_run(base: Path, name: str) -> Path:
    (folder,) = (each for each in (base / "output" / "dkd" / name).iterdir() if each.name != "cache")
    return folder


def read_journal(folder: Path, event: str) -> list[dict]:
    entries = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["event"] == event]


def test_a_graph_trains_a_student_from_prompts_and_draws_with_it(server):
    prompts = "\n".join(f"duck, flat style, {colour} background" for colour in ["pink", "white", "gray", "red"] * 2)
    graph = train("fresh", prompts=prompts, steps=4)
    outcome, seen = run(server, graph)
    assert seen[-1] == (4, 4)
    installed = server.base / "models" / "dha" / "fresh.safetensors"
    assert load_student(installed).config.levels == (0,)
    assert len(outcome.images("9")) == 1
    sizes = [Image.open(server.base / "temp" / shown["filename"]).size for shown in outcome.images("5")]
    assert sizes == [(960, 540), (128, 384)], "the curve, and one held-out prompt as teacher, student, difference"
    report = json.loads(outcome.text("5"))
    assert report["trained_now"] and report["steps"] == 4 and report["pairs"] == 8
    folder = find_run(server.base, "fresh")
    assert not (folder / "teacher.safetensors").exists()

    written = installed.stat().st_mtime_ns, (folder / "fresh.safetensors").stat().st_mtime_ns
    graph["5"]["inputs"]["prompts"] += "\n\n"  # ComfyUI sees another text and asks the node again
    outcome, seen = run(server, graph)
    assert not json.loads(outcome.text("5"))["trained_now"]
    assert "Nothing has changed" in outcome.outputs["5"]["summary"][0]
    assert written == (installed.stat().st_mtime_ns, (folder / "fresh.safetensors").stat().st_mtime_ns)

    shown = server.run({"1": node("DKDTrainingRecord", training=f"fresh/{folder.name}")})
    record = json.loads(shown.text("1"))
    assert record["state"] == "finished" and record["pairs"] == report["pairs"]
    drawn, before = (
        [Image.open(server.base / "temp" / entry["filename"]).tobytes() for entry in images]
        for images in (shown.images("1"), outcome.images("5"))
    )
    assert drawn == before


def test_no_input_changes_by_itself_between_two_runs(server):
    """The browser gives a widget called `seed` or `noise_seed` a new value after each run: nothing would go on."""
    inputs = {**server.info["DKDTrain"]["input"]["required"], **server.info["DKDTrain"]["input"]["optional"]}
    assert not {"seed", "noise_seed"} & set(inputs)
    assert not any(options[1].get("control_after_generate") for options in inputs.values())


def test_cancel_saves_and_the_same_graph_goes_on(server):
    graph = train("cancelled", **LONG)
    with pytest.raises(ServerError, match="cancelled in DKDTrain"):
        run(server, graph, server.interrupt)
    folder = find_run(server.base, "cancelled")
    (stop,) = read_journal(folder, "stop")
    assert (folder / f"state-{stop['step']:08d}.pt").is_file() and 0 < stop["step"] < LONG["steps"]
    assert not find_trainers(server)
    run(server, graph)
    assert [entry["step"] for entry in read_journal(folder, "start")] == [0, stop["step"]]
    assert (server.base / "models" / "dha" / "cancelled.safetensors").is_file()


def test_a_killed_trainer_is_explained_and_the_same_graph_goes_on(server):
    graph = train("killed", **LONG)

    def kill():
        (trainer,) = find_trainers(server)
        trainer.kill()

    with pytest.raises(ServerError, match="(?s)Queue again to go on .*killed.*memory.*distil"):
        run(server, graph, kill, after=110)
    folder = find_run(server.base, "killed")
    assert (folder / "state-00000100.pt").is_file() and not (folder / "killed.safetensors").exists()
    _, seen = run(server, graph)
    assert seen[-1] == (LONG["steps"], LONG["steps"])
    assert read_journal(folder, "start")[-1]["step"] >= 100


def test_a_mistake_of_the_data_is_what_the_message_begins_with(server):
    (server.base / "input" / "bare").mkdir()
    with pytest.raises(ServerError, match="DKD Train: .*bare holds no usable pair"):
        run(server, train("bare", data_folder="bare", steps=2))


def test_no_trainer_is_left_when_comfyui_is_killed(start):
    base, starting = start()
    with starting as server:
        server.info = server.get("/object_info")
        trainers = []

        def kill():
            trainers.extend(find_trainers(server))
            server.process.kill()

        with pytest.raises(ServerError, match="ended with exit status"):
            run(server, train("orphan", **LONG), kill)
        (trainer,) = trainers
        _, alive = psutil.wait_procs([trainer], timeout=60)
        assert not alive
    assert read_journal(find_run(base, "orphan"), "stop")


@pytest.fixture
def module(pack):
    return lambda name: sys.modules[f"{pack.__name__}.nodes.{name}"]


@pytest.fixture(scope="module")
def parts(studio, host):
    model, clip, vae = host.call("CheckpointLoaderSimple", ckpt_name=studio.checkpoint.name)
    return {"model": model, "clip": clip, "vae": vae}


def attempt(studio, parts, **inputs):
    settings = {"name": "attempt", "data_folder": "", "prompts": "owl", "preset": "mini", "steps": 2, "size": 0}
    return studio.host.call("DKDTrain", **{**settings, **parts, **inputs})


def test_a_model_after_apply_dha_is_refused(studio, parts):
    with pytest.raises(ValueError, match="DKD Train: .*went through Apply DHA.*connect the model from before"):
        attempt(studio, parts, model=studio.apply())


def test_a_model_that_is_not_sd_2_is_refused(studio, parts):
    with pytest.raises(ValueError, match="DKD Train: .*Stable Diffusion 1.x"):
        attempt(studio, parts, model=build_model("SD15", SD15))


def test_an_inpainting_model_is_refused(studio, parts):
    wide = {"in_channels": 9, "use_linear_in_transformer": True, "context_dim": 128}
    with pytest.raises(ValueError, match="DKD Train: .*inpainting.*9 input channels"):
        attempt(studio, parts, model=build_model("SD20", {**SD15, **wide}))


def test_another_prediction_type_than_the_checkpoints_is_refused(studio, host, parts):
    host.load_extra("model_advanced")
    kind = "v_prediction" if parts["model"].model.model_type.name == "EPS" else "eps"
    changed = studio.call("ModelSamplingDiscrete", model=parts["model"], sampling=kind, zsnr=False)
    with pytest.raises(ValueError, match="DKD Train: a ModelSamplingDiscrete node"):
        attempt(studio, parts, model=changed)


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "a\\b", ".hidden", "a\nb", "x" * 81, "end."])
def test_a_name_that_is_no_plain_file_name_is_refused(studio, parts, name):
    with pytest.raises(ValueError, match="DKD Train cannot call a student"):
        attempt(studio, parts, name=name)


def test_a_student_from_elsewhere_is_not_replaced(studio, parts):
    path = studio.write_student("precious")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="already has a precious.safetensors that was not trained here"):
        attempt(studio, parts, name="precious")
    assert path.read_bytes() == before


def test_neither_folder_nor_prompts_is_explained(studio, parts):
    with pytest.raises(ValueError, match="neither a data folder nor prompts"):
        attempt(studio, parts, prompts=" \n")


def test_patched_weights_are_in_the_teachers_file_and_not_in_the_model(module, parts, tmp_path):
    import comfy.sd

    export, name = module("export_teacher"), "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    model, others = parts["model"], (parts["clip"], parts["vae"])
    before = model.model.diffusion_model.state_dict()[name].clone()
    change = torch.randn_like(before)
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{name}": (change,)}, 0.5)
    with torch.inference_mode():
        export.write_checkpoint(tmp_path / "patched.safetensors", weights := export.collect_weights(patched, *others))
        keys = [export.hash_weights(weights)]
        keys += [export.hash_weights(export.collect_weights(each, *others)) for each in (model, patched)]
    assert keys[0] == keys[2] != keys[1]
    module("train").free_models()
    assert torch.equal(model.model.diffusion_model.state_dict()[name], before)
    loaded, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "patched.safetensors"))
    assert relate(loaded.model.diffusion_model.state_dict()[name], before + 0.5 * change) < 1e-3
    for found, expected in ((clip.get_sd(), others[0].get_sd()), (vae.get_sd(), others[1].get_sd())):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert loaded.model.model_type == model.model.model_type


@pytest.fixture
def data(module, monkeypatch, tmp_path):
    """`nodes.train_data` with input and user folders of its own, below `tmp_path`."""
    import folder_paths

    for name in ("input", "user"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return module("train_data")


def test_a_folder_below_the_input_folder_may_be_read(data, tmp_path):
    folder = write_pairs(tmp_path / "input" / "deep" / "pairs")
    (folder / "again.png").symlink_to(folder / "red.png")
    assert data.find_data("deep/pairs", "").folder == folder
    assert data.find_data(str(folder), "").folder == folder


@pytest.mark.parametrize(
    "text", ["../secret", "pairs/../../secret", "{base}/secret", "linked", "linked/deep", "/", "~"]
)
def test_a_folder_elsewhere_is_refused(data, tmp_path, text):
    write_pairs(tmp_path / "secret" / "deep")
    write_pairs(tmp_path / "input" / "pairs")
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "secret")
    words = "does not exist" if text == "~" else "below ComfyUI's input folder, and .* is not there"
    with pytest.raises(ValueError, match=words):
        data.find_data(text.format(base=tmp_path), "owl")


@pytest.mark.parametrize("target", ["secret/red.png", "secret", "gone"])
def test_a_link_in_the_folder_that_leads_out_is_refused(data, tmp_path, target):
    write_pairs(tmp_path / "secret")
    (write_pairs(tmp_path / "input" / "pairs") / "link.png").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="link.png .* leads out"):
        data.find_data("pairs", "")


@pytest.mark.parametrize(
    ("text", "words"), [("nowhere", "does not exist"), ("file.txt", "is a file"), ("a\0b", "null")]
)
def test_what_is_no_folder_is_explained(data, tmp_path, text, words):
    (tmp_path / "input" / "file.txt").write_text("owl")
    with pytest.raises(ValueError, match=f"DKD Train.*{words}"):
        data.find_data(text, "")


def test_the_servers_owner_can_allow_another_folder(data, tmp_path):
    folder = write_pairs(tmp_path / "elsewhere" / "pairs")
    (tmp_path / "user" / data.PERMISSIONS).write_text(f"allowed_data_folders = ['{tmp_path / 'elsewhere'}']")
    assert data.find_data(str(folder), "").folder == folder
    with pytest.raises(ValueError, match="is not there"):
        data.find_data(str(tmp_path / "user"), "")


@pytest.mark.parametrize("text", ["allowed_data_folders = ['relative']", "allowed_data_folders = 1", "no toml"])
def test_a_wrong_permission_file_is_explained(data, tmp_path, text):
    (tmp_path / "user" / data.PERMISSIONS).write_text(text)
    with pytest.raises(ValueError, match="dkd_train.toml in ComfyUI's user folder"):
        data.find_data("pairs", "")


def test_changed_data_is_another_run(data, tmp_path):
    folder = write_pairs(tmp_path / "input" / "pairs")
    before = data.find_data("pairs", "").key
    (folder / ".hidden").write_text("")
    assert data.find_data("pairs", "").key == before
    (folder / "red.txt").write_text("another prompt")
    assert data.find_data("pairs", "").key != before
    assert data.find_data("", "owl").key == data.find_data("", " owl \n\n").key != data.find_data("", "cat").key


def test_a_missing_library_is_named_with_the_command_that_brings_it(module, monkeypatch):
    process = module("train_process")
    monkeypatch.setattr(process, "NEEDED", ("torch", "no_such_library"))
    with pytest.raises(process.TrainerError, match="needs no_such_library; run .* -m pip install no_such_library"):
        process.check_needs()


def test_an_isolated_python_starts_the_trainer_too(module, tmp_path):
    """The portable ComfyUI's Python heeds neither PYTHONPATH nor the folder it is started in."""
    command = module("train_process").build_command(["--help"], isolated=True)
    done = subprocess.run([command[0], "-I", *command[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m dkd_trainer" in done.stdout, done.stderr


def test_a_journal_line_that_is_not_whole_is_left_out(module, tmp_path):
    journal = tmp_path / "journal.jsonl"
    assert module("train_journal").read_progress(journal) is None
    start = {
        "event": "start",
        "time": 0,
        "step": 0,
        "steps": 9,
        "stages": [{"name": "transfer", "first": 0, "steps": 9}],
    }
    step = {"event": "step", "time": 0, "step": 2, "stage": "transfer", "losses": {"attention": 0.5}}
    step |= {"images_per_second": 3.0, "seconds_left": 3720}
    journal.write_text("\n".join([json.dumps(start), json.dumps(step), json.dumps({**step, "step": 3})[:-5]]))
    progress = module("train_journal").read_progress(journal)
    assert (progress.step, progress.total) == (2, 9)
    assert progress.describe() == "transfer 2/9, attention 0.5000, 3.0 images/s, 1 h 2 min left"


@pytest.mark.parametrize("total", [1, 2, 7, 1000, 100_000])
@pytest.mark.parametrize("preset", ["mini", "sd21", "official"])
def test_steps_in_all_are_shared_in_the_presets_proportions(preset, total):
    settings = assemble_settings(preset)
    shared = share_steps(settings, total)
    assert shared.steps == total
    for name in ("transfer", "imitation", "quality"):
        expected = total * getattr(settings, name).steps / settings.steps
        assert abs(getattr(shared, name).steps - expected) <= 1
    with pytest.raises(SettingsError, match="--steps"):
        share_steps(settings, -1)


def test_the_end_of_its_input_ends_a_process_on_the_leash():
    code = "from dkd_trainer.leash import follow_parent; follow_parent(); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)
    process.stdin.close()
    assert process.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize("reason", ["patience", "second cancel"])
def test_a_trainer_that_does_not_end_is_killed(module, monkeypatch, tmp_path, reason):
    import comfy.model_management

    process, train_module = module("train_process"), module("train")
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(process, "build_command", lambda _: endless)
    monkeypatch.setattr(train_module, "PATIENCE", 1.0 if reason == "patience" else 600.0)
    started = process.TrainerProcess([], tmp_path / "log")
    comfy.model_management.interrupt_current_processing(reason == "second cancel")
    try:
        train_module.stop(started, "5")
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert started.process.returncode == -signal.SIGKILL
