"""WebDataset shards: tar files with NAME.jpg and NAME.txt or NAME.json, read where they lie, nothing is unpacked."""

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .folders import PICTURES
from .prompts import LONGEST, decode_prompt
from .source import (
    BAD_TEXT,
    CUT_OFF,
    HOSTILE,
    MISSING,
    NO_PICTURE,
    NO_PROMPT,
    DataError,
    Listing,
    Pair,
    Refused,
    Skip,
)

LARGEST = 256 * 2**20  # bytes of one picture
LONGEST_RECORD = 2**20  # bytes of one NAME.json
WANTED = "a .tar with NAME.jpg (or .png, .webp) and NAME.txt, or NAME.json with a `caption`"
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass
class Sample:
    """The members of a shard that share a name."""

    picture: tarfile.TarInfo | None = None
    texts: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def list_shards(shards: list[Path], name: str) -> Listing:
    """The pairs of every shard, in order; `name` is what the list is called in messages."""
    listing = Listing(name, WANTED)
    for path in shards:
        list_shard(path, listing)
    return listing


def find_shards(pattern: str) -> list[Path]:
    """Files that a pattern such as `{00000..00012}.tar` or `*.tar` names; raises DataError for what is no local tar."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{pattern} is not on this machine; download the shards and give their path")
    names = itertools.chain.from_iterable(
        sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name] for name in expand_braces(pattern)
    )
    shards = [Path(name) for name in names]
    if packed := [path.name for path in shards if path.suffix != ".tar"]:
        raise DataError(
            f"{packed[0]} (of {len(packed)}) is no plain .tar file; a compressed one must be unpacked to .tar"
        )
    if not any(path.is_file() for path in shards):
        raise DataError(f"no shard matches {pattern}; expected {WANTED}")
    return shards


def expand_braces(pattern: str, most: int = 100_000) -> Iterator[str]:
    """`a{0..2}` and `a{x,y}` as the names they stand for, as a shell does; raises DataError for more than `most`."""
    if not (match := BRACES.search(pattern)):
        yield pattern
        return
    first, last, words = match.groups()
    if words is None and int(last) - int(first) >= most:
        raise DataError(f"{pattern} stands for more than {most} files; give a shorter range")
    parts = words.split(",") if words else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    for part in parts:
        yield from expand_braces(pattern[: match.start()] + part + pattern[match.end() :], most)


def list_shard(path: Path, listing: Listing) -> None:
    """Add a shard's pairs, and what of it is skipped, to a listing."""
    samples: dict[str, Sample] = {}
    try:
        with path.open("rb") as file:
            try:
                sort_members(file, path.name, samples, listing)
            except (tarfile.TarError, ValueError) as error:  # a pair before the damage is as good as any
                listing.skipped.append(Skip(path.name, CUT_OFF, str(error)))
            for name, sample in samples.items():
                add_sample(file, path, name, sample, listing)
    except OSError as error:
        listing.skipped.append(Skip(path.name, MISSING, error.strerror or str(error)))


def sort_members(file: BinaryIO, shard: str, samples: dict[str, Sample], listing: Listing) -> None:
    """Collect a tar's members by sample; raises tarfile.TarError where it is damaged."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if fault := find_fault(member):
                listing.skipped.append(Skip(f"{shard}/{member.name!a}", HOSTILE, fault))
            elif member.isreg():
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}".lstrip("/"), Sample())
                if f".{kind.lower()}" in PICTURES:
                    sample.picture = member
                elif kind.lower() in ("txt", "json"):
                    sample.texts[kind.lower()] = member
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # the tar module takes a damaged header for the end
            raise tarfile.ReadError(f"damaged after {tar.offset} bytes")


def find_fault(member: tarfile.TarInfo) -> str | None:
    """Why a member is refused: nothing is unpacked, but a shard that tries such things is not to be trusted."""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "a link, device or sparse file"
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "its name leads out of the shard"
    return f"{member.size} bytes" if member.size > LARGEST else None


def add_sample(file: BinaryIO, path: Path, key: str, sample: Sample, listing: Listing) -> None:
    """Add one sample to a listing, as a pair or as skipped."""
    name = f"{path.name}/{key}"
    if sample.picture is None:
        listing.skipped.append(Skip(name, NO_PICTURE))
        return
    try:
        prompt = read_caption(file, sample.texts)
    except Refused as refused:
        listing.skipped.append(Skip(name, refused.reason, refused.detail))
        return
    listing.pairs.append(Pair(path, prompt, name, sample.picture.offset_data, sample.picture.size))


def read_caption(file: BinaryIO, texts: dict[str, tarfile.TarInfo]) -> str:
    """A sample's NAME.txt, or the `caption` of its NAME.json; raises Refused."""
    if text := texts.get("txt"):
        file.seek(text.offset_data)
        return decode_prompt(file.read(min(text.size, LONGEST + 1)))
    if not (record := texts.get("json")):
        raise Refused(NO_PROMPT)
    file.seek(record.offset_data)
    try:
        caption = json.loads(file.read(min(record.size, LONGEST_RECORD))).get("caption")
    except (ValueError, AttributeError, RecursionError) as error:
        raise Refused(BAD_TEXT, "NAME.json cannot be read") from error
    if not isinstance(caption, str):
        raise Refused(NO_PROMPT, "NAME.json has no `caption`")
    return decode_prompt(caption.encode(errors="replace"))
