"""Training scenes of the mini teacher: recipes, crops for the autoencoder, cached latents for the UNet."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .emoji import GROUPS, is_held_out, load_concepts, render_all
from .packages import fetch_packages
from .scenes import KINDS, Scene, draw_picture, draw_recipe, write_caption

SIZE = 128


@dataclass
class Emoji:
    """All pictures (n, 128, 128, 4) with their concepts, and the indices of each split by style, in some groups."""

    groups: tuple[str, ...]
    pictures: np.ndarray
    concepts: list
    train: dict[str, list[int]]
    held_out: dict[str, list[int]]

    def caption(self, scene: Scene, rng: random.Random | None = None) -> str:
        return write_caption(scene, self.concepts, rng)

    def draw(self, scene: Scene) -> np.ndarray:
        return draw_picture(scene, self.pictures, SIZE)


def load_emoji(work: Path, groups: tuple[str, ...] = tuple(GROUPS)) -> Emoji:
    """Download, render and split the emoji art of some groups; everything is kept in `work`."""
    fetch_packages(work / "packages")
    pictures, pairs = render_all(work / "packages", work, SIZE)
    table = load_concepts(work / "packages")
    split: tuple[dict, dict] = ({}, {})
    for index, (style, code) in enumerate(pairs):
        if table[code].group in groups:
            split[is_held_out(style, code)].setdefault(style, []).append(index)
    return Emoji(tuple(groups), pictures, [table[code] for _, code in pairs], *split)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def draw_crops(emoji: Emoji, rng: random.Random, batch: int, crop: int) -> torch.Tensor:
    """Random crops of training scenes, (B, 3, crop, crop) in [0, 1]."""
    crops = []
    for _ in range(batch):
        picture = emoji.draw(draw_recipe(rng, emoji.train))
        top, left = rng.randrange(SIZE - crop + 1), rng.randrange(SIZE - crop + 1)
        crops.append(picture[top : top + crop, left : left + crop])
    return to_tensor(np.stack(crops))


CHUNK, CHUNKS = 2048, 8  # scenes encoded together, and how many such chunks the teacher sees


def plan_chunk(emoji: Emoji, number: int) -> list[Scene]:
    """Chunk `number` of the training scenes; lone pictures go round all of them, the rest is chance."""
    rng = random.Random(f"scenes {number} {emoji.groups}")
    scenes = [draw_recipe(rng, emoji.train) for _ in range(CHUNK)]
    styles = {i: style for style, members in emoji.train.items() for i in members}
    order = sorted(styles)
    random.Random("order").shuffle(order)
    turn = int(number * CHUNK * KINDS["one"])
    for n, scene in enumerate(scenes):
        if scene.kind == "one":
            index = order[turn % len(order)]
            scenes[n] = replace(scene, first=index, style=styles[index])
            turn += 1
    return scenes


def plan_held_out(emoji: Emoji, count: int, seed: int = 99) -> list[Scene]:
    """Scenes of held-out pictures whose concept was seen in another style, all kinds in turn."""
    rng = random.Random(seed)
    seen = {emoji.concepts[i].code for members in emoji.train.values() for i in members}
    pool = {s: [i for i in m if emoji.concepts[i].code in seen] for s, m in emoji.held_out.items()}
    pool = {s: m for s, m in pool.items() if len(m) > 1}
    kinds = ["one", "one", *list(KINDS)[1:]]
    return [draw_recipe(rng, pool, kinds[i % len(kinds)]) for i in range(count)]


@torch.inference_mode()
def encode_scenes(emoji: Emoji, scenes: list[Scene], encode, batch: int = 32) -> torch.Tensor:
    """Latents (n, 4, 16, 16) float32 of scenes, with a progress bar."""
    chunks = []
    for start in tqdm(range(0, len(scenes), batch), desc="encode", leave=False):
        chunks.append(encode(to_tensor(np.stack([emoji.draw(s) for s in scenes[start : start + batch]]))))
    return torch.cat(chunks)


def chunk_path(emoji: Emoji, number: int, work: Path) -> Path:
    return work / f"latents-{'-'.join(emoji.groups)}-{number:03d}.safetensors"


def load_chunk(emoji: Emoji, number: int, encode, work: Path) -> torch.Tensor:
    """Latents (2048, 4, 16, 16) of one chunk of training scenes, encoded the first time they are asked for."""
    path = chunk_path(emoji, number, work)
    if not path.exists():
        partial = path.with_suffix(".partial")
        save_file({"latents": encode_scenes(emoji, plan_chunk(emoji, number), encode).half().contiguous()}, partial)
        partial.rename(path)
    return load_file(path)["latents"].float()
