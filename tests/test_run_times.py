"""Run times of the shipped workflows: what is written says where and with what they were taken."""

import json

from workflows.machine import Machine
from workflows.run_times import write_times

MACHINE = Machine("a processor", 2, "cpu", "0.3.75", "2.13", "3.11", "abc", "python -m workflows.shipping --thumbnails")


def test_both_files_have_every_workflow_and_the_command(tmp_path):
    write_times(tmp_path / "results", {"smallest": 3.14159, "train": 61.0}, MACHINE)
    figures = json.loads((tmp_path / "results" / "run-times.json").read_text())
    assert figures["seconds"] == {"smallest": 3.1, "train": 61.0} and figures["machine"]["command"] == MACHINE.command
    text = (tmp_path / "results" / "run-times.md").read_text()
    for part in ("| smallest | 3.1 |", "| train | 61.0 |", "a processor, 2 cores", MACHINE.command, "abc"):
        assert part in text
