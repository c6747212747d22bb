"""What is recorded beside a result can be read by others, and run by them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dkd_trainer import record
from dkd_trainer.record import current_command, current_commit

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("/home/me/pairs/train", "train"),
        ("data.cache=/home/me/cache", "data.cache=cache"),
        ("--out=/home/me/a.safetensors", "--out=a.safetensors"),
        (
            'pair.controls=["/a/low.safetensors", "/b/mid.safetensors"]',
            'pair.controls=["low.safetensors", "mid.safetensors"]',
        ),
        (f"{ROOT}/workflows/results/evaluation.json", "workflows/results/evaluation.json"),
        ("../mini/pairs", "../mini/pairs"),
        ("K/V strided by 2 (1/4 of the keys)", "K/V strided by 2 (1/4 of the keys)"),
    ],
)
def test_a_recorded_command_names_no_place_of_the_machine(argument, recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", argument])
    assert current_command("module").removeprefix("python -m module ").strip("'") == recorded


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_commit_says_when_the_files_were_not_those_of_it(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert current_commit() == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    clean = current_commit()
    assert len(clean) >= 7 and "-" not in clean
    (tmp_path / "code.py").write_text("2, and more")
    assert current_commit() == f"{clean}-dirty"
