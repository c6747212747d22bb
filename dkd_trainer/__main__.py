"""`python -m dkd_trainer`: distil a student from a teacher checkpoint and a folder of pictures with prompts."""

import argparse
import importlib
import sys
from pathlib import Path

from .engine.leash import follow_parent
from .fields import SettingsError
from .host import ensure_comfy, explain_shortage
from .settings import Settings, assemble_settings, list_presets, parse_override, share_steps

COMMANDS = {  # modules with a `main` of their own, and what they do
    "ablation": ("evidence.ablation", "what each stage and each part of a student is worth, at equal training time"),
    "control": ("control.command", "train a frequency control, convert a published one, or evaluate them"),
    "encode": ("data.encode", "fill a cache with latents and text embeddings ahead of training"),
    "evaluate": ("evidence.evaluate", "compare teacher, students and peers on held-out pairs"),
    "import": ("import_student", "turn a published student into a file for Load DHA Student"),
}
ORDER = """\
Settings count in this order: defaults, preset, file, options. All of them stand, with their values, in the .toml file
beside a finished student. The same command goes on where it was stopped."""


def describe_commands() -> str:
    """What stands above the options in the help."""
    others = "\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items())
    return f"{__doc__}\n\nother commands, each with a --help of its own (python -m dkd_trainer COMMAND ...):\n{others}"


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; an option with a dotted `dest` is short for the setting of that name, and so is `start`."""
    parser = argparse.ArgumentParser(
        prog="python -m dkd_trainer",
        description=describe_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog=ORDER,
    )
    parser.add_argument("--config", type=Path, default=None, help="a TOML file of settings")
    parser.add_argument("--preset", choices=list_presets(), default="", help="start from shipped settings")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting: train.batch=8")
    parser.add_argument("--steps", type=int, default=0, help="steps in all, shared by the stages as in the settings")
    parser.add_argument("--dry-run", action="store_true", default=False, help="build all, try each stage, keep nothing")
    parser.add_argument(
        "--stop-with-parent",
        action="store_true",
        default=False,
        help="save and stop when standard input ends, which the program that starts this one holds open",
    )
    parser.add_argument("--comfyui", default=None, help="ComfyUI's folder, when not on PYTHONPATH (or COMFYUI_PATH)")
    add_shorthands(parser.add_argument_group("short for settings"))
    return parser.parse_args(arguments)


def add_shorthands(group: argparse._ArgumentGroup) -> None:
    """Options that stand for one setting each."""

    def add(option: str, name: str, text: str, **kind) -> None:
        group.add_argument(option, dest=name, help=f"{text} [{name}]", **kind)

    add("--teacher", "teacher.file", "an SD-2.x checkpoint (default: the mini SD-2.1)")
    add("--control", "pair.controls", "control files: the student of a teacher that they steer", nargs="+")
    add("--start", "start", "a student file to begin with instead of fresh weights")
    add("--data", "data.path", "folder with image/ and prompt/, or pictures beside .txt files")
    add("--held-out", "data.held_out", "pairs for validation alone (default: some of the data are set aside)")
    add("--size", "data.size", "side of the training pictures in pixels (mini teacher: 128)", type=int)
    add("--out", "output.file", "the student file to write, for ComfyUI's models/dha")
    add("--work", "output.work", "where states and caches are kept (default: beside the student)")
    add("--levels", "student.levels", "UNet levels to replace, 0 is the finest", type=int, nargs="+")
    add("--token-budget", "student.token_budget", "keys as a share of a level's tokens", type=float)
    add("--coarse-share", "student.coarse_share", "share of the keys that form the grid", type=float)
    add("--memory", "student.memory", "learned tokens per layer", type=int)
    add("--rank", "student.rank", "rank of the corrections of q, k, v and out", type=int)
    add("--router", "student.router_width", "width of the router, 0 for none", type=int)
    add("--local", "student.local", "channels of the convolution beside the attention, 0 for none", type=int)
    add("--transfer-steps", "transfer.steps", "stage 1: each layer learns its teacher's output", type=int)
    add("--imitation-steps", "imitation.steps", "stage 2: the whole student learns the prediction", type=int)
    add("--quality-steps", "quality.steps", "stage 3: real pictures count more and more", type=int)
    add("--batch", "train.batch", "samples of a step, over all processes", type=int)
    add("--seed", "train.seed", "decides every draw", type=int)
    add("--device", "train.device", "auto, cpu or cuda")


def read_settings(args: argparse.Namespace) -> Settings:
    """All settings of a command line; raises SettingsError."""
    shorthands = [(name, value) for name, value in vars(args).items() if "." in name or name == "start"]
    overrides = [*shorthands, *map(parse_override, args.set)]
    settings = assemble_settings(args.preset, args.config, overrides)
    if args.steps:
        settings = share_steps(settings, args.steps)
    for name, value, option in (
        ("data.path", settings.data.path, "--data"),
        ("output.file", settings.output.file, "--out"),
    ):
        if not value:
            raise SettingsError(f"setting {name!r} is missing; give {option}, or the setting in a file")
    if settings.out.suffix != ".safetensors":
        raise SettingsError(
            f"setting 'output.file' is {settings.output.file!r}, expected a name ending in .safetensors"
        )
    return settings


def train(settings: Settings, dry_run: bool) -> None:
    """Load teacher and data and train, or try it."""
    from .control.pair import PairTraining
    from .data.batches import open_sources
    from .engine.loop import Training
    from .engine.occupancy import occupy
    from .engine.processes import Processes
    from .engine.rehearsal import rehearse
    from .host import Teacher

    processes = Processes(settings.train)
    kind = PairTraining if settings.pair.controls else Training
    if dry_run:
        return rehearse(Teacher(settings.teacher_file, processes.device), settings, processes, kind)
    with occupy(settings.work, processes):
        teacher = Teacher(settings.teacher_file, processes.device)
        corpora = open_sources(teacher, settings, not processes.is_first)
        if processes.is_first:
            print(f"{corpora[0].describe()}; {teacher.architecture.label}, {teacher.prediction} prediction")
        kind(teacher, corpora[0], settings, processes, corpora[1]).run()
    if processes.is_first:
        print(f"wrote {settings.out}")


def main() -> None:
    """Another command's main, or a training."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return importlib.import_module(f".{COMMANDS[sys.argv[1]][0]}", __package__).main(sys.argv[2:])
    args = read_arguments(sys.argv[1:])
    settings = read_settings(args)
    ensure_comfy(args.comfyui, settings.train.device)
    if args.stop_with_parent:
        follow_parent()
    from .engine.state import TrainingStopped

    try:
        with explain_shortage("train.batch, or a larger train.accumulation, which makes a batch in parts."):
            train(settings, args.dry_run)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped outside of a training; the same command goes on")
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        sys.exit(f"dkd_trainer: {error}")
