"""Pictures with prompts on disk, and their latents and text embeddings, computed once and kept."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(ValueError):
    """No usable pairs; the message lists what was found."""


@dataclass(frozen=True)
class Pair:
    """One picture file and its prompt."""

    picture: Path
    prompt: str


def find_pairs(folder: Path) -> tuple[list[Pair], list[str]]:
    """Pairs in both layouts (`image/x.jpg` + `prompt/x.txt`, or `x.jpg` + `x.txt`), and what was skipped and why.

    Raises DataError when there is no usable pair.
    """
    images = folder / "image" if (folder / "image").is_dir() else folder
    prompts = folder / "prompt" if (folder / "prompt").is_dir() else images
    pairs, skipped = [], []
    for picture in sorted(p for p in images.iterdir() if p.suffix.lower() in PICTURES) if images.is_dir() else []:
        text = prompts / f"{picture.stem}.txt"
        try:
            prompt = text.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(f"{picture.name}: no readable prompt ({type(error).__name__} for {text.name})")
            continue
        if not prompt:
            skipped.append(f"{picture.name}: {text.name} is empty")
            continue
        pairs.append(Pair(picture, prompt))
    if not pairs:
        raise DataError(
            f"{folder} holds no picture with a prompt ({len(skipped)} skipped); expected image/NAME.jpg with "
            "prompt/NAME.txt, or NAME.jpg with NAME.txt side by side"
        )
    return pairs, skipped


def read_picture(path: Path, size: int) -> Tensor:
    """A picture (3, size, size) in [0, 1], cut to the middle square; raises DataError for a broken file."""
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path.name} cannot be read as a picture: {error}") from error
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def cache_key(pairs: list[Pair], size: int, teacher: str) -> str:
    """A name for the cached tensors of these very files, size and teacher."""
    listing = [(p.picture.name, p.picture.stat().st_size, p.picture.stat().st_mtime_ns, p.prompt) for p in pairs]
    return hashlib.sha256(json.dumps([listing, size, teacher]).encode()).hexdigest()[:16]


def load_encoded(pairs: list[Pair], size: int, teacher, cache: Path) -> tuple[dict[str, Tensor], list[str]]:
    """`latents` (n, 4, h, w) and `context` (n, 77, C) in fp16 with the empty prompt's as `empty`, and pictures skipped.

    Computed once; a kill leaves a whole cache file or none. `teacher` is a `host.Teacher`.
    """
    path = cache / f"pairs-{cache_key(pairs, size, teacher.fingerprint)}.safetensors"
    if path.exists():
        return load_file(path), []
    latents, contexts, skipped = [], [], []
    for pair in tqdm(pairs, desc="encode pairs"):
        try:
            picture = read_picture(pair.picture, size)
        except DataError as error:
            skipped.append(str(error))
            continue
        latents.append(teacher.encode_picture(picture[None])[0].half())
        contexts.append(teacher.encode_prompt(pair.prompt)[0].half())
    if not latents:
        raise DataError(f"none of the {len(pairs)} pictures could be read; the first: {skipped[0]}")
    tensors = {
        "latents": torch.stack(latents),
        "context": torch.stack(contexts),
        "empty": teacher.encode_prompt("").half(),
    }
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)
    return tensors, skipped
