"""Pictures on their way into the cache: hashed, cut, encoded in batches while the next ones are read."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .buckets import Framing
from .ledger import Ledger, Look, read_stamp
from .pictures import cut_picture, decode_picture, measure_picture
from .source import NOT_FINITE, Pair, Refused, Skip

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture to encode: its file, the content it had, and the shape to cut it to."""

    pair: Pair
    digest: str
    width: int
    height: int


def map_ahead(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`map` in a pool, in order, with at most `ahead` results waiting."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def split(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while part := list(itertools.islice(iterator, size)):
        yield part


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def look_at(pair: Pair) -> tuple[Pair, str, Look]:
    """A picture's hash and size, with the stamp that its file had before."""
    stamp, digest = read_stamp(pair.picture), ""
    try:
        data = pair.read_bytes()
        digest = hash_bytes(data)
        return pair, stamp, Look(digest, *measure_picture(data))
    except Refused as refused:
        return pair, stamp, Look(digest, reason=refused.reason, detail=refused.detail)


def look_at_all(pairs: list[Pair], ledger: Ledger, pool: Executor, title: str = "") -> list[Look]:
    """Every pair's look, from the ledger where its file is unchanged."""

    def look_anew(new: list[Pair]) -> list[Look]:
        looks: list[Look] = []
        with tqdm(total=len(new), desc=title, disable=not title) as bar:
            for part in split(map_ahead(pool, look_at, new, 64), 512):
                ledger.remember(part)
                looks += [look for _, _, look in part]
                bar.update(len(part))
        return looks

    return recall(pairs, ledger, look_anew)


def recall(pairs: list[Pair], ledger: Ledger, find: Callable[[list[Pair]], list[Look]]) -> list[Look]:
    """Every pair's look from the ledger; `find` is asked once for all of those that it does not know."""
    known = [ledger.look_up(pair) for pair in pairs]
    missing = [pair for pair, look in zip(pairs, known, strict=True) if look is None]
    found = iter(find(missing) if missing else [])
    return [look or next(found) for look in known]


def frame_picture(pair: Pair, look: Look, framing: Framing) -> Frame | Skip:
    """How a picture will be cut, or why it is not used."""
    try:
        if look.reason:
            raise Refused(look.reason, look.detail)
        return Frame(pair, look.digest, *framing.choose_shape(look.width, look.height))
    except Refused as refused:
        return Skip(pair.name, refused.reason, refused.detail)


def cut_frame(frame: Frame) -> Tensor | Refused | None:
    """A picture (3, h, w) in [0, 1] if it still is what was hashed, otherwise None; a refusal where it is broken."""
    try:
        data = frame.pair.read_bytes()
    except Refused:
        return None
    if hash_bytes(data) != frame.digest:
        return None
    try:
        return cut_picture(decode_picture(data), frame.width, frame.height)
    except Refused as refused:
        return refused


def encode_pictures(teacher, frames: list[Frame], pool: Executor, batch: int) -> Iterator[Tensor | Refused | None]:
    """Latents (4, h, w) in half precision, one result a frame; all frames have one shape."""
    for part in split(map_ahead(pool, cut_frame, frames, 2 * batch), batch):
        good = [picture for picture in part if isinstance(picture, Tensor)]
        latents = iter(teacher.encode_picture(torch.stack(good)).cpu().half() if good else ())
        for picture in part:
            yield check_finite(next(latents)) if isinstance(picture, Tensor) else picture


def check_finite(value: Tensor) -> Tensor | Refused:
    return value if value.isfinite().all() else Refused(NOT_FINITE, "in half precision")
