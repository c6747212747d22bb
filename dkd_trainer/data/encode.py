"""`python -m dkd_trainer encode`: fill a cache ahead of training, in any number of processes, and time it."""

import argparse
import os
import time
from pathlib import Path

import torch

from ..host import SHIPPED_TEACHER, Teacher, ensure_comfy
from ..settings import TrainSettings


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; the defaults encode squares for the shipped mini teacher."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer encode", description=__doc__)
    parser.add_argument("--teacher", type=Path, default=SHIPPED_TEACHER, help="an SD-2.x checkpoint (the mini SD-2.1)")
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
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default=TrainSettings().precision,
        help="for prompts alone: the training's train.precision, which draws them anew else (%(default)s)",
    )
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


def choose_device() -> torch.device:
    """The GPU that a launcher gave this process (LOCAL_RANK), the first without a launcher, the processor without any.

    It becomes the current one, on which the host puts text encoder and VAE.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def encode(args: argparse.Namespace, teacher: Teacher):
    """The `corpus.Corpus` of the arguments, with what the cache did not hold yet; raises DataError."""
    from .corpus import open_corpus
    from .drawing import Drawing
    from .encoder import Effort

    return open_corpus(
        args.data,
        teacher,
        args.cache,
        args.size,
        step=args.step,
        max_ratio=args.max_ratio,
        min_side=args.min_side,
        limit=args.limit,
        drawing=Drawing(args.draw_steps, args.cfg, args.seed, args.precision),
        effort=Effort(args.batch, args.rows),
    )


def main(arguments: list[str]) -> None:
    args = read_arguments(arguments)
    ensure_comfy(args.comfyui)
    teacher = Teacher(args.teacher, choose_device())
    start = time.perf_counter()
    corpus = encode(args, teacher)
    seconds = time.perf_counter() - start
    print(corpus.describe())
    print(f"opened in {seconds:.2f} s, {corpus.made} encoded here ({corpus.made / seconds:.1f} pairs/s)")
    print(f"from the cache: {time_reading(corpus):.0f} pairs/s in batches of 16")
