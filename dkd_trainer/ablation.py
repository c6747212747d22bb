"""`python -m dkd_trainer.ablation`: what each part of the hybrid context is worth, on held-out pairs."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from .host import ROOT, Teacher, ensure_comfy


def read_arguments() -> argparse.Namespace:
    """The command line."""
    teacher = ROOT / "workflows" / "models" / "checkpoints" / "mini-sd21.safetensors"
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer.ablation", description=__doc__)
    parser.add_argument("--teacher", type=Path, default=teacher)
    parser.add_argument("--data", type=Path, required=True, help="folder of training pairs")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of held-out pairs")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--levels", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--transfer-steps", type=int, default=200, help="stage-1 steps of every trained row; 0 leaves them out"
    )
    parser.add_argument("--imitation-steps", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of trained rows to run")
    parser.add_argument("--comfyui")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def list_training_free(teacher: Teacher, levels: tuple[int, ...]) -> dict[str, dict]:
    """`transformer_options` of every row that needs no training, by name."""
    from .contexts import builder_options, grid_and_chosen, pool_keys, removed_options, stride_keys, window_options

    builders = {f"strided by {s}": stride_keys(s) for s in (2, 3, 4)}
    builders |= {f"pooled by {s}": pool_keys(s) for s in (2, 3, 4)}
    builders |= {
        "strided 4 + 6 % random, unweighted": grid_and_chosen(4, 0.0625, "random", weighted=False),
        "strided 4 + 6 % by mass, unweighted": grid_and_chosen(4, 0.0625, "mass", weighted=False),
        "strided 4 + 6 % random, weighted": grid_and_chosen(4, 0.0625, "random"),
        "strided 4 + 6 % by mass, weighted": grid_and_chosen(4, 0.0625, "mass"),
        "strided 3 + 12 % by mass, weighted": grid_and_chosen(3, 0.125, "mass"),
    }
    rows = {"attention removed": removed_options(levels)}
    rows |= {f"windows {s}x{s}": window_options(s, levels) for s in (8, 4)}
    return rows | {name: builder_options(teacher, builder, levels) for name, builder in builders.items()}


def list_trained(levels: tuple[int, ...]) -> dict:
    """Configurations of the trained rows, by name, at one budget unless the name says otherwise."""
    from dha.config import DHAConfig

    full = DHAConfig(levels=levels, token_budget=0.125, memory=8, rank=8, router_width=32)
    change = dataclasses.replace
    return {
        "all parts": full,
        "no memory": change(full, memory=0),
        "no deltas": change(full, rank=0),
        "no router": change(full, router_width=0),
        "deltas alone": change(full, router_width=0, memory=0),
        "deltas q, k, v": change(full, deltas=("q", "k", "v")),
        "deltas k, v, out": change(full, deltas=("k", "v", "out")),
        "rank 16": change(full, rank=16),
        "weighted": change(full, weighted=True),
        "grid 3/4 of the keys": change(full, coarse_share=0.75),
        "all keys routed": change(full, coarse_share=0.0),
    }


def main() -> None:
    args = read_arguments()
    ensure_comfy(args.comfyui)
    from .batches import TensorCorpus
    from .evaluate import to_markdown, write_text
    from .evaluation import Subject, measure_errors
    from .imitation import student_options
    from .loop import train_student
    from .pairs import find_pairs, load_encoded
    from .record import current_command, current_commit
    from .settings import assemble_settings

    levels = tuple(args.levels)
    teacher = Teacher(args.teacher, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    held_out, _ = load_encoded(find_pairs(args.held_out)[0][: args.count], args.size, teacher, args.out / "cache")
    rows = {}

    def measure(name: str, options: dict) -> None:
        rows[name] = measure_errors(teacher, Subject(name, options), held_out)
        print(f"{name}: {rows[name]['mean']:.4f}", flush=True)

    for name, options in list_training_free(teacher, levels).items():
        measure(name, options)
    if args.transfer_steps:
        pairs, _ = load_encoded(find_pairs(args.data)[0], args.size, teacher, args.out / "cache")
        for name, config in list_trained(levels).items():
            if args.only and name not in args.only:
                continue
            stem = name.replace(" ", "-").replace("/", "-").replace(",", "")
            settings = assemble_settings(
                overrides=[
                    *((f"student.{field}", value) for field, value in dataclasses.asdict(config).items()),
                    ("transfer.steps", args.transfer_steps),
                    ("imitation.steps", args.imitation_steps),
                    ("train.batch", 32),
                    ("data.size", args.size),
                    ("output.file", str(args.out / f"{stem}.safetensors")),
                    ("watch.validate_every", 0),
                    ("watch.sheet_every", 0),
                ]
            )
            student = train_student(teacher, TensorCorpus(pairs), settings)
            measure(f"trained {args.transfer_steps}+{args.imitation_steps}: {name}", student_options(student))
    record = {"command": current_command("dkd_trainer.ablation"), "commit": current_commit()}
    write_text(args.out / "ablation.json", json.dumps({**record, "pairs": args.count, "rows": rows}, indent=1))
    write_text(args.out / "ablation.md", to_markdown(rows))


if __name__ == "__main__":
    main()
