"""The pairs of any kind of source, and all their tensors at once where a data set is small."""

from pathlib import Path

from torch import Tensor

from .folders import list_folder
from .pictures import read_picture
from .prompts import list_prompts
from .shards import find_shards, list_shards
from .source import DataError, Listing, Pair

__all__ = ["DataError", "Pair", "find_pairs", "list_source", "load_encoded", "read_picture"]


def list_source(source: Path | str, limit: int | None = None) -> Listing:
    """The pairs (at most `limit`) of a folder, of .tar shards or of a .txt of prompts; raises DataError without any."""
    path = Path(source)
    if path.is_dir():
        shards = [] if (path / "image").is_dir() else sorted(path.glob("*.tar"))
        listing = list_shards(shards, str(source)) if shards else list_folder(path)
    elif path.suffix == ".txt":
        listing = list_prompts(path)
    elif ".tar" in str(source):
        listing = list_shards(find_shards(str(source)), str(source))
    else:
        found = "is no folder" if path.exists() else "does not exist"
        raise DataError(
            f"{source} {found}; expected a folder with image/NAME.jpg with prompt/NAME.txt or pictures beside their "
            ".txt, shards as DIR/{00000..00012}.tar, or a .txt with one prompt a line"
        )
    listing.pairs = listing.pairs[:limit]
    listing.check()
    return listing


def find_pairs(source: Path | str) -> tuple[list[Pair], list[str]]:
    """The pairs of a source, and what was skipped and why; raises DataError when there is no usable pair."""
    listing = list_source(source)
    return listing.pairs, [str(skip) for skip in listing.skipped]


def load_encoded(pairs: list[Pair], size: int, teacher, cache: Path) -> tuple[dict[str, Tensor], list[str]]:
    """`latents` (n, 4, h, w) and `context` (n, 77, C) in fp16 with the empty prompt's as `empty`, and what was skipped.

    All of it in memory: for a few hundred pairs, `open_corpus` is for the others. `teacher` is a `host.Teacher`.
    """
    from .buckets import Framing
    from .corpus import encode_listing

    listing = Listing("the list", "pictures with prompts", list(pairs))
    corpus = encode_listing(listing, teacher, cache, Framing(size))
    latents, context = corpus.read(range(len(corpus)))
    tensors = {"latents": latents.half(), "context": context.half(), "empty": corpus.empty.half()}
    return tensors, [str(skip) for skip in corpus.skipped]
