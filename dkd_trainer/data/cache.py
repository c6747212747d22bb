"""Tensors kept on disk by key: shards of some hundred rows, written whole, read row by row."""

import contextlib
import errno
import hashlib
import inspect
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dha.whole_file import write_whole

from .source import DataError, Refused

Item = TypeVar("Item")
FORMAT = "dkd-cache-1"
LOCKLESS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a file system without locks answers


def make_key(*parts: object) -> bytes:
    """A key of 16 bytes for what decides a tensor."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


class Store:
    """Equally shaped tensors by key in a folder of shards of up to `rows`; processes that share it share the work.

    `made` counts the rows that this process made. Every shard carries the keys of its rows and of what was refused, so
    the files are all there is to keep consistent. A kill leaves whole shards only, and since the rest is cut into the
    same shards again, the result is the same.
    """

    def __init__(self, folder: Path, rows: int = 512):
        self.folder, self.rows, self.made = folder, rows, 0
        self.files: list[Path] = []
        self.places: dict[bytes, tuple[int, int]] = {}
        self.refused: dict[bytes, Refused] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def find(self, key: bytes) -> tuple[int, int] | Refused | None:
        """The place (shard, row) of a tensor, why it was refused, or None when neither is known."""
        return self.places.get(key) or self.refused.get(key)

    def refresh(self) -> None:
        """Take in the shards that were written since; a damaged one is deleted, its rows are made again."""
        known = set(self.files)
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path not in known:
                try:
                    self.take_in(path)
                except (SafetensorError, OSError, ValueError, KeyError) as error:
                    logging.warning("%s is damaged (%s), it is made again", path, error)
                    path.unlink(missing_ok=True)

    def take_in(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            refused, keys = json.loads((file.metadata() or {})[FORMAT]), file.get_tensor("keys").numpy()
        self.refused.update((bytes.fromhex(key), Refused(*why)) for key, why in refused.items())
        for row, key in enumerate(keys):
            self.places.setdefault(key.tobytes(), (len(self.files), row))
        self.files.append(path)

    def fill(
        self,
        items: dict[bytes, Item],
        encode: Callable[[list[Item]], Iterator[Tensor | Refused | None]],
        row_bytes: int,
        title: str = "",
    ) -> None:
        """Make what is missing: `encode` yields a tensor, a refusal to remember, or None to try again next time.

        Shards that another process is at are left to it and waited for. Raises DataError when the disk is full.
        """
        missing = [key for key in items if self.find(key) is None]
        if not missing:
            return
        check_space(self.folder, len(missing) * row_bytes)
        chunks = [missing[start : start + self.rows] for start in range(0, len(missing), self.rows)]
        with tqdm(total=len(missing), desc=title, disable=not title) as bar:
            while chunks:
                left = [chunk for chunk in chunks if not self.make_shard(chunk, items, encode, bar)]
                if len(left) == len(chunks):
                    bar.set_postfix_str("waiting for another process")
                    time.sleep(0.2)
                chunks = left
        self.refresh()

    def make_shard(self, keys: list[bytes], items: dict[bytes, Item], encode, bar: tqdm) -> bool:
        """Write the shard of these keys unless it is there; False when another process is at it."""
        path = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.safetensors"
        with hold(path.with_suffix(".lock")) as state:
            if state == "taken":
                return False
            if path.exists():
                bar.update(len(keys))
                return True
            for leftover in self.folder.glob(f".{path.name}.*.partial") if state == "ours" else ():
                leftover.unlink(missing_ok=True)
            found = []
            for result in encode([items[key] for key in keys]):
                found.append(result)
                bar.update()
            write_shard(path, keys, found)
            self.made += len(found)
            return True


def write_shard(path: Path, keys: list[bytes], found: Sequence[Tensor | Refused | None]) -> None:
    """Write rows and refusals as one file, or nothing when there are none; raises DataError when that fails."""
    good = [(key, value) for key, value in zip(keys, found, strict=True) if isinstance(value, Tensor)]
    refused = {k.hex(): [r.reason, r.detail] for k, r in zip(keys, found, strict=True) if isinstance(r, Refused)}
    if not good and not refused:
        return
    tensors = {
        "keys": torch.from_numpy(np.frombuffer(b"".join(key for key, _ in good), np.uint8).reshape(-1, 16).copy()),
        "values": torch.stack([value.half() for _, value in good]) if good else torch.zeros(0, 1).half(),
    }
    content = save(tensors, metadata={FORMAT: json.dumps(refused)})  # one entry: their order is by chance
    try:
        write_whole(path, content)
    except OSError as error:
        raise DataError(describe_full(path.parent, len(content), error.strerror or str(error))) from error


def check_space(folder: Path, needed: int) -> None:
    """Raise DataError when the disk cannot hold that many bytes more."""
    if shutil.disk_usage(folder).free < needed:
        raise DataError(describe_full(folder, needed, "it is too full"))


def describe_full(folder: Path, needed: int, reason: str) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"the cache {folder} cannot be written ({reason}): {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB "
        "are free; make room or put the cache on another disk (what is encoded so far is kept)"
    )


@contextlib.contextmanager
def hold(path: Path) -> Iterator[str]:
    """A lock while the block runs: `ours`, `taken` by another process, or `none` on a file system without locks.

    A killed process loses its locks. Without locks work may be done twice, never wrongly. Raises OSError where the file
    itself cannot be made.
    """
    lock = make_lock(path)
    state = try_lock(lock)
    try:
        yield state
    finally:
        if state == "ours":
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            lock.release()


@contextlib.contextmanager
def wait_for(path: Path) -> Iterator[None]:
    """`hold` for work that another process may be at: first it is waited for."""
    while True:
        with hold(path) as state:
            if state != "taken":
                yield
                return
        time.sleep(0.2)


def make_lock(path: Path) -> BaseFileLock:
    """A lock of the system's, not one that is held by a file's existence: a killed process would keep that for ever."""
    only = {"fallback_to_soft": False} if "fallback_to_soft" in inspect.signature(FileLock).parameters else {}
    return FileLock(path, **only)


def try_lock(lock: BaseFileLock) -> str:
    """What came of it, as `hold` says it; nothing is waited for."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return "taken"
    except NotImplementedError:
        return "none"
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        return "none"
    return "ours"


class Reader:
    """Rows of the shards of a store, each read from its place in the file when it is asked for.

    Reading beats mapping the files: a page fault at a random place makes the system read megabytes around it.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.layouts: dict[int, tuple[int, tuple[int, ...]]] = {}

    def read(self, places: Iterable[Sequence[int]]) -> Tensor:
        """Rows at (shard, row) places, as float32 (B, ...); raises DataError when a shard is gone."""
        rows = [self.read_row(shard, row) for shard, row in places]
        return torch.stack(rows).float()

    def read_row(self, shard: int, row: int) -> Tensor:
        try:
            with self.files[shard].open("rb", buffering=0) as file:
                if shard not in self.layouts:
                    self.layouts[shard] = read_layout(file)
                start, shape = self.layouts[shard]
                values = torch.empty(shape, dtype=torch.float16)
                file.seek(start + row * values.nbytes)
                if file.readinto(values.numpy()) != values.nbytes:
                    raise OSError("it is shorter than it was")
        except (OSError, ValueError) as error:
            raise DataError(
                f"the cached shard {self.files[shard]} cannot be read any more ({error}); start again to encode it"
            ) from error
        return values


def read_layout(file: BinaryIO) -> tuple[int, tuple[int, ...]]:
    """Where a safetensors file's `values` start, in bytes, and the shape of one row."""
    length = int.from_bytes(file.read(8), "little")
    entry = json.loads(file.read(length))["values"]
    return 8 + length + entry["data_offsets"][0], tuple(entry["shape"][1:])
