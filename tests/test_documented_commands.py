"""Every command of the trainer that a page shows is one that the trainer takes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "dkd_trainer/README.md",
    "workflows/results/README.md",
    "workflows/results/ablation.md",
)
COMMAND = re.compile(r"python -m dkd_trainer(?:\.mini)? [^`]*?--.*")  # with options
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PLACEHOLDERS = {"N": "1", "S": "0.5", "FILE": "file.safetensors"}


def find_commands(text: str) -> list[str]:
    """Commands with options in blocks, a line each, and between backquotes, where they may be broken."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = [" ".join(found.split()) for found in INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.S))]
    shown = [found[0] for line in (*lines, *inline) if (found := COMMAND.search(line))]
    return [re.sub(r"\s+#.*", "", command) for command in shown]


COMMANDS = [(page, command) for page in PAGES for command in find_commands((ROOT / page).read_text(encoding="utf-8"))]


def read_command(command: str, monkeypatch) -> None:
    """Let the trainer's own readers have it; argparse ends the process for what it does not take."""
    _, _, module, *arguments = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    if module == "dkd_trainer.mini":
        monkeypatch.setattr(sys, "argv", ["mini", *arguments])
        importlib.import_module("dkd_trainer.mini.__main__").read_arguments()
        return
    trainer = importlib.import_module("dkd_trainer.__main__")
    if arguments[0] not in trainer.COMMANDS:
        args = trainer.read_arguments(arguments)
        return None if args.config else trainer.read_settings(args)
    place, _ = trainer.COMMANDS[arguments.pop(0)]
    if arguments[:1] == ["evaluate"]:
        place = "control.evaluate"
        arguments.pop(0)
    importlib.import_module(f"dkd_trainer.{place}").read_arguments(arguments)


def test_the_pages_show_commands_of_every_kind():
    kinds = {command.split()[3] for _, command in COMMANDS if command.split()[2] == "dkd_trainer"}
    assert {"--preset", "ablation", "control", "evaluate"} <= kinds and len(COMMANDS) > 15


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_on_a_page_is_accepted(page, command, monkeypatch):
    read_command(command, monkeypatch)


def test_help_names_every_command_and_each_has_its_own(capsys):
    trainer = importlib.import_module("dkd_trainer.__main__")
    with pytest.raises(SystemExit):
        trainer.read_arguments(["--help"])
    shown = capsys.readouterr().out
    for name, (place, text) in trainer.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", shown, re.M)
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"dkd_trainer.{place}").main(["--help"])
        assert not ended.value.code and f"dkd_trainer {name}" in capsys.readouterr().out


def test_a_command_that_is_no_more_is_found(monkeypatch):
    text = "as `python -m dkd_trainer ablation --data D --held-out H\n--transfer-steps 0 --out DIR` does"
    (command,) = find_commands(text)
    with pytest.raises(SystemExit):
        read_command(command, monkeypatch)
