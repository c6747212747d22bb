"""What is recorded beside a result can be read by others, and run by them."""

import sys
from pathlib import Path

import pytest

from dkd_trainer.record import current_command

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
