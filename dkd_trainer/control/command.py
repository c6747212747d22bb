"""`python -m dkd_trainer control`: train a frequency control, convert a published one, or evaluate them."""

import argparse
import importlib
import sys
from pathlib import Path

from dha.frequency import BANDS

from ..fields import SettingsError
from ..host import ensure_comfy
from ..settings import parse_override
from .settings import ControlSettings, assemble_control

OPTIONS = {
    "--teacher": ("teacher.file", str, "an SD-2.x checkpoint (default: the mini SD-2.1)"),
    "--data": ("data.path", str, "folder with image/ and prompt/, or pictures beside .txt files"),
    "--held-out": ("data.held_out", str, "pairs for validation alone (default: some of the data are set aside)"),
    "--size": ("data.size", int, "side of the training pictures in pixels (mini teacher: 128)"),
    "--out": ("output.file", str, "the control file to write, for ComfyUI's models/dha_control"),
    "--work": ("output.work", str, "where states and caches are kept (default: beside the file)"),
    "--band": ("control.band", str, f"one of {', '.join(BANDS)}"),
    "--rank": ("control.rank", int, "rank of the changes to the teacher's encoder, 0 trains all weights"),
    "--steps": ("control.steps", int, "training steps"),
    "--rate": ("control.rate", float, "learning rate"),
    "--batch": ("train.batch", int, "samples of a step, over all processes"),
    "--seed": ("train.seed", int, "decides every draw"),
    "--device": ("train.device", str, "auto, cpu or cuda"),
}


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line: options of `train`, which is meant where no other command is named, or of `convert`."""
    if arguments[:1] not in (["train"], ["convert"], ["-h"], ["--help"]):
        arguments = ["train", *arguments]
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer control", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train the branch of one band (the default)",
        argument_default=argparse.SUPPRESS,
        epilog="The same command goes on where it was stopped.",
    )
    train.add_argument("--config", type=Path, default=None, help="a TOML file of settings")
    train.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting: train.ema=0.99")
    train.add_argument("--comfyui", default=None, help="ComfyUI's folder, when not on PYTHONPATH (or COMFYUI_PATH)")
    for option, (name, kind, text) in OPTIONS.items():
        train.add_argument(option, dest=name, type=kind, help=f"{text} [{name}]")
    convert = commands.add_parser("convert", help="read the branch of a published FCDiffusion teacher or student")
    convert.add_argument("checkpoint", type=Path, help="a Lightning checkpoint; nothing in it is executed")
    convert.add_argument("--band", required=True, choices=list(BANDS), help="the band it was trained for")
    convert.add_argument(
        "--norm-groups", type=int, help="of the transformers' norms (default: 4 in a student, 32 in a teacher)"
    )
    convert.add_argument("--out", type=Path, required=True, help="the control file to write")
    commands.add_parser("evaluate", help="measure controls on held-out pictures, with teacher and students")
    return parser.parse_args(arguments)


def read_settings(args: argparse.Namespace) -> ControlSettings:
    """All settings of a command line; raises SettingsError."""
    shorthands = [(name, value) for name, value in vars(args).items() if "." in name]
    settings = assemble_control(args.config, [*shorthands, *map(parse_override, args.set)])
    for name, value in (("--data", settings.data.path), ("--out", settings.output.file)):
        if not value:
            raise SettingsError(f"{name} is missing; give it, or its setting in a file")
    check_name(settings.out)
    return settings


def check_name(path: Path) -> None:
    """Raise SettingsError unless ComfyUI would list the file."""
    if path.suffix != ".safetensors":
        raise SettingsError(f"the control file is to be {path.name!r}, expected a name ending in .safetensors")


def train(settings: ControlSettings) -> None:
    """Load teacher and data and train."""
    from ..data.batches import open_sources
    from ..engine.occupancy import occupy
    from ..engine.processes import Processes
    from ..host import Teacher
    from .training import train_control

    processes = Processes(settings.train)
    with occupy(settings.work, processes):
        teacher = Teacher(settings.teacher_file, processes.device)
        corpus, held_out = open_sources(teacher, settings, not processes.is_first)
        train_control(teacher, corpus, settings, processes, held_out)
    if processes.is_first:
        print(f"wrote {settings.out} ({settings.out.stat().st_size:,} bytes)")


def convert(args: argparse.Namespace) -> None:
    """Write a published checkpoint's branch as a control file."""
    from dha.control_file import read_published, save_control

    check_name(args.out)
    control = read_published(args.checkpoint, args.band, args.norm_groups)
    save_control(args.out, control)
    kind = f"{control.config.attention} attention, norms of {control.config.norm_groups} groups"
    print(f"wrote {args.out}: {control.architecture.label}, band {args.band}, {kind}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["evaluate"]:
        return importlib.import_module(".evaluate", __package__).main(arguments[1:])
    args = read_arguments(arguments)
    if args.command == "convert":
        return convert(args)
    settings = read_settings(args)
    ensure_comfy(args.comfyui, settings.train.device)
    from ..engine.state import TrainingStopped

    try:
        train(settings)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
