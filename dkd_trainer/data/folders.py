"""Folders of pictures with prompts: `image/NAME.jpg` + `prompt/NAME.txt`, or both side by side, at any depth."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .prompts import read_prompt
from .source import MISSING, NO_PROMPT, Listing, Pair, Refused, Skip

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def list_folder(folder: Path) -> Listing:
    """The pairs of a folder in both layouts, sorted by name."""
    images = folder / "image" if (folder / "image").is_dir() else folder
    prompts = folder / "prompt" if (folder / "prompt").is_dir() else images
    others: Counter[str] = Counter()
    listing = Listing(str(folder), "")
    for picture in walk_files(images):
        if picture.suffix.lower() not in PICTURES:
            others[picture.suffix] += 1
            continue
        name = picture.relative_to(images)
        try:
            prompt = read_prompt(prompts / name.with_suffix(".txt"))
        except Refused as refused:
            reason = NO_PROMPT if refused.reason == MISSING else refused.reason
            listing.skipped.append(Skip(name.as_posix(), reason, refused.detail))
            continue
        listing.pairs.append(Pair(picture, prompt, name.as_posix()))
    seen = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(4))
    listing.wanted = (
        "image/NAME.jpg with prompt/NAME.txt, NAME.jpg with NAME.txt side by side, or .tar shards "
        f"(pictures: {' '.join(sorted(PICTURES))}); other files there: {seen or 'none'}"
    )
    return listing


def walk_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder in sorted order; hidden ones and linked folders are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))
