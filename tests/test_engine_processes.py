"""The trainer as a process: killed, asked to stop, and shared out over two processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dha.checkpoint import load_student

ROOT = Path(__file__).resolve().parent.parent
RUN = """--size 128 --levels 0 --memory 4 --rank 4 --router 16 --transfer-steps 6 --imitation-steps 6 --quality-steps 4
    --batch 4 --device cpu --set train.accumulation=2 --set imitation.blocks=0.5 --set watch.validate_every=0
    --set watch.sheet_every=0 --set watch.log_every=1 --set output.save_every=2"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A data set of four pictures, and the cache that all runs share."""
    folder = tmp_path_factory.mktemp("pairs")
    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (128, 128), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{colour} picture")
    return ["--data", str(folder), "--set", f"data.cache={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture
def command(studio, source):
    """A training's command; every run writes a student of its own name."""

    def build(out, *more, start=(sys.executable, "-m", "dkd_trainer")):
        return [*start, "--teacher", str(studio.checkpoint), "--out", str(out), *source, *RUN.split(), *more]

    return build


def launch(command, **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **settings}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def finish(command):
    process = launch(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def read_steps(out):
    journal = out.parent / f"{out.stem}.work" / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["step"]: entry["losses"] for entry in entries if entry["event"] == "step"}


def interrupt(command, out, number, after):
    """Start a training, send it a signal once it has done `after` steps; returns what it printed, and its status."""
    process = launch(command)
    wait_for_step(process, out, after)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return output, process.returncode


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 240
    while step not in read_steps(out):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the training does not get on"
        time.sleep(0.01)


def load_weights(out):
    return load_student(out).named_weights()


@pytest.fixture(scope="module")
def whole(studio, source, tmp_path_factory):
    """An undisturbed run's student."""
    out = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    teacher = ["--teacher", str(studio.checkpoint)]
    finish([sys.executable, "-m", "dkd_trainer", *teacher, "--out", str(out), *source, *RUN.split()])
    return out


def test_a_killed_training_goes_on_to_the_same_student_to_the_bit(command, whole, tmp_path):
    out = tmp_path / "killed.safetensors"
    _, status = interrupt(command(out), out, signal.SIGKILL, after=3)
    assert status == -signal.SIGKILL and not out.exists()
    _, status = interrupt(command(out), out, signal.SIGKILL, after=9)
    assert status == -signal.SIGKILL and not out.exists()
    finish(command(out))
    assert all(torch.equal(tensor, load_weights(whole)[name]) for name, tensor in load_weights(out).items())
    assert read_steps(out) == read_steps(whole)


def test_a_training_that_is_asked_to_stop_saves_says_so_and_loses_nothing(command, whole, tmp_path):
    out = tmp_path / "stopped.safetensors"
    output, status = interrupt(command(out), out, signal.SIGTERM, after=5)
    assert status == 128 + signal.SIGTERM
    done = max(read_steps(out))
    assert output.splitlines()[-1] == f"stopped at step {done}, the state is saved; the same command goes on from there"
    assert (tmp_path / "stopped.work" / f"state-{done:08d}.pt").exists()
    finish(command(out))
    assert all(torch.equal(tensor, load_weights(whole)[name]) for name, tensor in load_weights(out).items())


def test_a_second_training_in_a_work_folder_names_the_first_and_leaves_it_alone(command, tmp_path):
    out = tmp_path / "shared.safetensors"
    folder = tmp_path / "shared.work"
    first = launch(command(out, "--transfer-steps", "2000"))
    try:
        wait_for_step(first, out, 1)
        second = launch(command(out, "--transfer-steps", "2000"))
        output, _ = second.communicate(timeout=120)
        assert second.returncode == 1 and "Traceback" not in output
        assert f"is in use by process {first.pid} on {socket.gethostname()} since " in output
        assert "another --work folder" in output and first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    assert '"error"' not in (folder / "journal.jsonl").read_text()
    assert not [file.name for file in folder.glob("run.*")]


def test_all_processes_of_a_run_are_refused_a_folder_that_is_in_use(talking, command, tmp_path):
    from dkd_trainer.engine.occupancy import take

    folder = tmp_path / "shared.work"
    with take(folder) as reason:
        assert reason == ""
        output, status = run_two(command, tmp_path / "shared.safetensors")
    assert status and f"is in use by process {os.getpid()}" in output
    assert not folder.exists() or not list(folder.iterdir())


@pytest.fixture(scope="module")
def talking():
    """Skips where two processes cannot reach each other, whatever they run."""
    settings = f"--nproc_per_node 2 --master_addr 127.0.0.1 --master_port {find_port()} --no-python"
    code = "import torch.distributed as d; d.init_process_group('gloo'); d.barrier()"
    start = [sys.executable, "-m", "torch.distributed.run", *settings.split(), sys.executable, "-c", code]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"two processes cannot talk to each other here: {done.stderr.strip().splitlines()[-1]}")


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(command, out):
    """A training on two processes; returns what it printed, and its status."""
    settings = f"--nproc_per_node 2 --master_addr 127.0.0.1 --master_port {find_port()} -m dkd_trainer"
    start = (sys.executable, "-m", "torch.distributed.run", *settings.split())
    process = launch(command(out, "--set", "train.accumulation=1", start=start), start_new_session=True)
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return output, process.returncode


def test_two_processes_have_the_losses_of_one(talking, command, whole, tmp_path):
    out = tmp_path / "two.safetensors"
    output, status = run_two(command, out)
    assert status == 0, output
    start_event = json.loads((tmp_path / "two.work" / "journal.jsonl").read_text().splitlines()[0])
    assert start_event["processes"] == 2
    one, two = read_steps(whole), read_steps(out)
    assert one.keys() == two.keys()
    for step, losses in one.items():
        assert two[step] == pytest.approx(losses, rel=1e-3), step


def test_two_processes_that_are_signalled_over_and_over_save_before_they_end(talking, command, tmp_path):
    """As a scheduler does it: the processes and their launcher, which passes its signal on."""
    out = tmp_path / "two.safetensors"
    settings = f"--nproc_per_node 2 --master_addr 127.0.0.1 --master_port {find_port()} -m dkd_trainer"
    start = (sys.executable, "-m", "torch.distributed.run", *settings.split())
    more = ["--set", "train.accumulation=1", "--transfer-steps", "2000", "--set", "output.save_every=5000"]
    process = launch(command(out, *more, start=start), start_new_session=True)
    try:
        wait_for_step(process, out, 2)
        first = json.loads((tmp_path / "two.work" / "run.json").read_text())["process"]
        for _ in range(3):
            os.kill(first, signal.SIGTERM)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    journal = [json.loads(line) for line in (tmp_path / "two.work" / "journal.jsonl").read_text().splitlines()]
    assert journal[-1]["event"] == "stop", output
    assert (tmp_path / "two.work" / f"state-{journal[-1]['step']:08d}.pt").exists()


def run_two_hosts(commands):
    """One training on two hosts of one process each, by a command each; what they printed, and their statuses."""
    ports = f"--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {find_port()}".split()
    hosts = []
    for number, command in enumerate(commands):
        start = (sys.executable, "-m", "torch.distributed.run", *ports, "--node_rank", str(number), "-m", "dkd_trainer")
        hosts.append(launch(command(start), start_new_session=True))
    try:
        outputs = [host.communicate(timeout=300)[0] for host in hosts]
    except subprocess.TimeoutExpired:
        for host in hosts:
            os.killpg(host.pid, signal.SIGKILL)
        raise
    return outputs, [host.returncode for host in hosts]


@pytest.fixture
def hosts(command, source, tmp_path):
    """Commands of one training for two hosts that share no folder; a change may be made to the second one's pairs."""

    def build(change=lambda folder: None, others=()):
        folder = tmp_path / "other" / "pairs"
        shutil.copytree(source[1], folder)
        change(folder)
        more = ["--set", "train.accumulation=1"]
        own = [*more, *others, "--data", str(folder), "--set", f"data.cache={tmp_path / 'other' / 'cache'}"]
        outs = tmp_path / "one.safetensors", tmp_path / "other" / "two.safetensors"
        return [lambda start, o=o, m=m: command(o, *m, start=start) for o, m in zip(outs, (more, own), strict=True)]

    return build


def test_two_hosts_without_a_common_folder_have_the_losses_of_one(talking, hosts, whole, tmp_path):
    outputs, statuses = run_two_hosts(hosts())
    assert statuses == [0, 0], outputs
    one, two = read_steps(whole), read_steps(tmp_path / "one.safetensors")
    assert one.keys() == two.keys()
    for step, losses in one.items():
        assert two[step] == pytest.approx(losses, rel=1e-3), step
    assert not (tmp_path / "other" / "two.safetensors").exists(), "the first host alone writes the student"


@pytest.mark.parametrize(
    ("prompt", "others", "named"),
    [
        ("another prompt", [], "pairs was '4, "),
        ("red picture", ["--seed", "1"], "train.seed was 0, is 1"),
    ],
    ids=["pairs", "settings"],
)
def test_hosts_with_different_runs_are_refused_before_a_step_is_made(talking, hosts, tmp_path, prompt, others, named):
    outputs, statuses = run_two_hosts(hosts(lambda folder: (folder / "0.txt").write_text(prompt), others))
    assert all(statuses) and named in outputs[0] and "give all hosts the same files and settings" in outputs[0]
    assert not read_steps(tmp_path / "one.safetensors")


def test_a_dry_run_says_what_to_expect_and_leaves_nothing(command, tmp_path):
    out = tmp_path / "dry.safetensors"
    output = finish(command(out, "--dry-run"))
    for part in (
        "latents (4, 4, 16, 16): 4 pairs",
        "trainable parameters in 5 layers",
        "teacher alone",
        "encoding, once: 4 pairs",
        "time to finish",
    ):
        assert part in output
    rest = r"[\d.]+ times the teacher alone \([\d.]+ images/s\), [\d.]+% outside of the models"
    for stage in ("transfer", "imitation", "quality"):
        speed = rf"^{stage}: \d steps, [\d.]+ images/s \([\d.]+ without the cache\), {rest}; "
        assert re.search(speed, output, re.MULTILINE), stage
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.bach=2"], "unknown setting 'train.bach'; the nearest that exists is 'train.batch'"),
        (["--config", "absent.toml"], "absent.toml cannot be read"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(command, tmp_path, options, message):
    process = launch(command(tmp_path / "s.safetensors", *options))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and message in output and "Traceback" not in output
