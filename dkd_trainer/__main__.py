"""`python -m dkd_trainer`: distil a student from a teacher checkpoint and a folder of pictures with prompts."""

import argparse
import sys
from pathlib import Path

import torch

from .host import ROOT, Teacher, ensure_comfy


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; every default trains the shipped mini student."""
    models = ROOT / "workflows" / "models"
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer", description=__doc__)
    parser.add_argument(
        "--teacher", type=Path, default=models / "checkpoints" / "mini-sd21.safetensors", help="an SD-2.x checkpoint"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with image/ and prompt/, or pictures beside .txt files"
    )
    parser.add_argument("--out", type=Path, required=True, help="the student file to write, for ComfyUI's models/dha")
    parser.add_argument("--work", type=Path, help="where states and caches are kept (default: beside the student)")
    parser.add_argument("--comfyui", help="ComfyUI's folder, when it is not on PYTHONPATH (or COMFYUI_PATH)")
    parser.add_argument(
        "--size", type=int, default=512, help="side of the training pictures in pixels (mini teacher: 128)"
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1], help="UNet levels to replace, 0 is the finest")
    parser.add_argument("--token-budget", type=float, default=0.125, help="keys as a share of a level's tokens")
    parser.add_argument("--coarse-share", type=float, default=0.8, help="share of the keys that form the grid")
    parser.add_argument(
        "--weighted", action="store_true", help="grid tokens count for all they stand for, by a bias in softmax"
    )
    parser.add_argument("--memory", type=int, default=16, help="learned tokens per layer")
    parser.add_argument("--rank", type=int, default=8, help="rank of the corrections of q, k, v and out")
    parser.add_argument("--router", type=int, default=64, help="width of the router, 0 for none")
    parser.add_argument(
        "--transfer-steps", type=int, default=1500, help="stage 1: each layer learns its teacher's output"
    )
    parser.add_argument(
        "--imitation-steps", type=int, default=500, help="stage 2: the whole student learns the teacher's prediction"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main() -> None:
    from dha.config import DHAConfig

    from .loop import Run, train_student
    from .pairs import find_pairs, load_encoded

    args = read_arguments(sys.argv[1:])
    ensure_comfy(args.comfyui)
    config = DHAConfig(
        levels=tuple(args.levels),
        token_budget=args.token_budget,
        coarse_share=args.coarse_share,
        weighted=args.weighted,
        memory=args.memory,
        rank=args.rank,
        router_width=args.router,
    )
    run = Run(config, args.transfer_steps, args.imitation_steps, args.batch, seed=args.seed)
    pairs, skipped = find_pairs(args.data)
    work = args.work or args.out.parent / f"{args.out.stem}.work"
    work.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(args.teacher, torch.device(args.device))
    encoded, broken = load_encoded(pairs, args.size, teacher, work)
    for line in [*skipped, *broken]:
        print(f"skipped {line}")
    print(f"{len(encoded['latents'])} pairs, {teacher.architecture.label}, {teacher.prediction} prediction")
    train_student(teacher, encoded, run, args.out, work / f"{args.out.stem}.state.pt")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (FileNotFoundError, ValueError, FloatingPointError) as error:
        sys.exit(f"dkd_trainer: {error}")
