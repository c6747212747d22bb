"""The pairs of any kind of source."""

from pathlib import Path

from .folders import list_folder
from .prompts import list_prompts
from .shards import find_shards, list_shards
from .source import DataError, Listing


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
