"""`python -m dkd_trainer.mini`: make the mini SD-2.1 from nothing, or write its training pairs."""

import argparse
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..host import ensure_comfy
from .emoji import GROUPS


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer.mini", description=__doc__)
    parser.add_argument(
        "command", choices=["train", "export", "pairs"], help="train (resumes), export the best so far, or write pairs"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for downloads, caches and states; outside the repository"
    )
    parser.add_argument("--comfyui", help="ComfyUI's folder, when it is not on PYTHONPATH (or COMFYUI_PATH)")
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument(
        "--steps", type=int, default=6500, help="UNet steps of 64 scenes; a larger number goes on from the last state"
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, or folder of the pairs")
    parser.add_argument("--start", type=Path, help="a finished checkpoint to go on from, where its states are lost")
    parser.add_argument(
        "--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="what to draw; may grow later"
    )
    parser.add_argument("--train-pairs", type=int, default=4096)
    parser.add_argument("--held-out-pairs", type=int, default=512)
    return parser.parse_args()


def write_pairs(emoji, scenes: list, folder: Path) -> None:
    """Scenes as image/00000.png with prompt/00000.txt."""
    for name in ("image", "prompt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(tqdm(scenes, desc=folder.name)):
        Image.fromarray(emoji.draw(scene)).save(folder / "image" / f"{i:05d}.png")
        (folder / "prompt" / f"{i:05d}.txt").write_text(emoji.caption(scene), encoding="utf-8")


def export(work: Path, out: Path, emoji, autoencoder_steps: int) -> None:
    """Write the averaged weights that were best on held-out pairs as a checkpoint."""
    from .autoencoder import train_autoencoder
    from .data import CHUNKS, plan_chunk
    from .export import save_checkpoint
    from .model import Tokens
    from .teacher import MiniTeacher

    state = torch.load(work / "best.pt", weights_only=True)
    model = MiniTeacher()
    model.load_state_dict(state["model"])
    tokens, rng = Tokens(), random.Random(0)
    shown = {
        t
        for n in range(CHUNKS)
        for s in plan_chunk(emoji, n)
        for t in tokens([emoji.caption(s), emoji.caption(s, rng)]).flatten().tolist()
    }
    words = {w for concept in emoji.concepts for w in concept.tags}
    shown |= set(tokens(sorted(words)).flatten().tolist())
    autoencoder = train_autoencoder(emoji, work, autoencoder_steps)
    record = {"steps": state["step"], "batch": 64, "held_out_loss": state["held_out"]}
    save_checkpoint(out, model.unet, model.text, autoencoder, shown, record)
    print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MB), step {state['step']}, loss {state['held_out']:.4f}")


def main() -> None:
    args = read_arguments()
    ensure_comfy(args.comfyui)
    from .data import CHUNK, load_emoji, plan_chunk, plan_held_out

    args.work.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji(args.work, tuple(args.groups))
    if args.command == "pairs":
        chunks = [scene for number in range(-(-args.train_pairs // CHUNK)) for scene in plan_chunk(emoji, number)]
        write_pairs(emoji, chunks[: args.train_pairs], args.out / "train")
        write_pairs(emoji, plan_held_out(emoji, args.held_out_pairs), args.out / "held-out")
        return
    if args.command == "train":
        from .export import start_from

        if args.start:
            print(f"going on from {args.start.name}, step {start_from(args.start, args.work, args.steps)}")
        from .autoencoder import train_autoencoder
        from .teacher import train_teacher

        train_teacher(emoji, train_autoencoder(emoji, args.work, args.autoencoder_steps), args.work, args.steps)
    export(args.work, args.out, emoji, args.autoencoder_steps)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (FileNotFoundError, FileExistsError, ValueError, RuntimeError) as error:
        sys.exit(f"dkd_trainer.mini: {error}")
