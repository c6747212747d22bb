"""`python -m dkd_trainer encode`: fill a cache ahead of training, in any number of processes, and time it."""

import argparse
import time
from pathlib import Path

import torch

from ..host import ROOT, Teacher, ensure_comfy


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; the defaults encode squares for the shipped mini teacher."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer encode", description=__doc__)
    parser.add_argument(
        "--teacher", type=Path, default=ROOT / "workflows" / "models" / "checkpoints" / "mini-sd21.safetensors"
    )
    parser.add_argument("--data", required=True, help="a folder of pairs, .tar shards, or a .txt of prompts to draw")
    parser.add_argument("--cache", type=Path, required=True, help="the cache folder; it may be shared")
    parser.add_argument("--size", type=int, default=512, help="side of square pictures in pixels (mini teacher: 128)")
    parser.add_argument("--max-ratio", type=float, default=1.0, help="longest side ratio of the buckets; 1: squares")
    parser.add_argument("--step", type=int, default=64, help="sides of buckets are multiples of it, in pixels")
    parser.add_argument("--min-side", type=int, help="pictures with a shorter side are skipped (default: size / 2)")
    parser.add_argument("--limit", type=int, help="the first pairs only")
    parser.add_argument("--draw-steps", type=int, default=25, help="Euler steps for prompts alone")
    parser.add_argument("--cfg", type=float, default=7.5, help="guidance for prompts alone")
    parser.add_argument("--seed", type=int, default=0, help="noise for prompts alone")
    parser.add_argument("--batch", type=int, default=8, help="pictures encoded at once")
    parser.add_argument("--rows", type=int, default=512, help="pairs in one file of the cache")
    parser.add_argument("--comfyui", help="ComfyUI's folder, when it is not on PYTHONPATH (or COMFYUI_PATH)")
    return parser.parse_args(arguments)


def time_reading(corpus, batch: int = 16, seconds: float = 2.0) -> float:
    """Pairs read from the cache in a second, in random batches of one bucket."""
    generator, count = torch.Generator().manual_seed(0), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for members in corpus.buckets.values():
            picks = torch.randint(len(members), (batch,), generator=generator)
            corpus.read([members[i] for i in picks.tolist()])
            count += batch
    return count / (time.perf_counter() - start)


def main(arguments: list[str]) -> None:
    args = read_arguments(arguments)
    ensure_comfy(args.comfyui)
    from .corpus import open_corpus
    from .drawing import Drawing
    from .encoder import Effort

    framing = {"step": args.step, "max_ratio": args.max_ratio, "min_side": args.min_side}
    drawing, effort = Drawing(args.draw_steps, args.cfg, args.seed), Effort(args.batch, args.rows)
    teacher = Teacher(args.teacher, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    start = time.perf_counter()
    corpus = open_corpus(
        args.data, teacher, args.cache, args.size, **framing, limit=args.limit, drawing=drawing, effort=effort
    )
    seconds = time.perf_counter() - start
    print(corpus.describe())
    print(f"opened in {seconds:.2f} s, {corpus.made} encoded here ({corpus.made / seconds:.1f} pairs/s)")
    print(f"from the cache: {time_reading(corpus):.0f} pairs/s in batches of 16")
