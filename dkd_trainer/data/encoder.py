"""Brings pairs into the cache: which tensors they need, where those are kept, what was refused."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .buckets import Framing
from .cache import Reader, Store, make_key, wait_for
from .drawing import Drawing, Sketch, draw_latents, plan_seeds
from .frames import Frame, check_finite, encode_pictures, frame_picture, look_at_all, recall, split
from .ledger import Ledger, Look
from .source import CHANGED, DataError, Listing, Pair, Refused, Skip, name_source

RECIPE = "covered, middle, lanczos, transparency on white"  # a picture's latent depends on it; change it with the code
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Effort:
    """How the work is done: `batch` pictures at once, `rows` to a file of the cache, without bars where `quiet`."""

    batch: int = 8
    rows: int = 512
    quiet: bool = False


@dataclass
class Encoded:
    """Pairs with what was made of them: the key of each latent, its shape (width, height), and the stores by shape."""

    pairs: list[Pair]
    keys: list[bytes]
    shapes: list[tuple[int, int]]
    contexts: Store
    latents: dict[tuple[int, int], Store]
    skipped: list[Skip] = field(default_factory=list)

    def locate(self) -> Iterator[tuple[Pair, bytes, tuple[int, int], tuple[int, int], tuple[int, int]]]:
        """Pair, key, shape, and the (shard, row) of its latent and its context; the others are added to `skipped`."""
        for pair, key, shape in zip(self.pairs, self.keys, self.shapes, strict=True):
            latent, context = self.latents[shape].find(key), self.contexts.find(make_key("prompt", pair.prompt))
            if isinstance(latent, tuple) and isinstance(context, tuple):
                yield pair, key, shape, latent, context
                continue
            refused = [found for found in (latent, context) if isinstance(found, Refused)]
            why = refused[0] if refused else Refused(CHANGED, "start again to encode it")
            self.skipped.append(Skip(pair.name, why.reason, why.detail))


class Encoder:
    """Makes what the cache lacks; the teacher is a `host.Teacher`."""

    def __init__(self, teacher, folder: Path, framing: Framing, drawing: Drawing, effort: Effort):
        self.teacher, self.folder, self.framing, self.drawing, self.effort = teacher, folder, framing, drawing, effort
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the cache folder {folder} cannot be made: {error.strerror}; choose another one"
            ) from error

    def open_store(self, name: str) -> Store:
        return Store(self.folder / name, self.effort.rows)

    def title(self, text: str) -> str:
        return "" if self.effort.quiet else text

    def encode(self, listing: Listing) -> Encoded:
        """Pairs with pictures."""
        with ThreadPoolExecutor(WORKERS) as pool:
            looks = self.look(listing, pool)
            found = [frame_picture(pair, look, self.framing) for pair, look in zip(listing.pairs, looks, strict=True)]
            frames = [frame for frame in found if isinstance(frame, Frame)]
            contexts = self.fill_contexts([frame.pair.prompt for frame in frames])
            keys = [make_key(RECIPE, frame.digest, frame.width, frame.height) for frame in frames]
            latents = self.fill_latents(dict(zip(keys, frames, strict=True)), pool)
        skipped = [skip for skip in found if isinstance(skip, Skip)]
        shapes = [(frame.width, frame.height) for frame in frames]
        return Encoded([frame.pair for frame in frames], keys, shapes, contexts, latents, skipped)

    def look(self, listing: Listing, pool: Executor) -> list[Look]:
        """What the pictures are; of several processes the first reads the files, the others what it remembered.

        For what is known already none waits for another: at each start of a large run that would take hours.
        """
        ledger, lock = Ledger(self.folder / "looks.sqlite"), self.folder / f"looks-{name_source(listing.source)}.lock"

        def find(missing: list[Pair]) -> list[Look]:
            with wait_for(lock) if ledger.database else contextlib.nullcontext():
                return look_at_all(missing, ledger, pool, self.title("look at pictures"))

        with contextlib.closing(ledger):
            return recall(listing.pairs, ledger, find)

    def fill_contexts(self, prompts: list[str]) -> Store:
        """The contexts of prompts and of the empty one, each once."""
        store = self.open_store(f"prompts-{self.teacher.text_fingerprint}")
        items = {make_key("prompt", prompt): prompt for prompt in ["", *prompts]}
        row_bytes = 77 * self.teacher.architecture.context * 2
        store.fill(items, self.encode_prompts, row_bytes, self.title("encode prompts"))
        return store

    def encode_prompts(self, prompts: list[str]) -> Iterator[Tensor | Refused]:
        """Contexts (77, C) in half precision, one a prompt."""
        for part in split(prompts, 4 * self.effort.batch):
            yield from (check_finite(context) for context in self.teacher.encode_prompts(part).cpu().half())

    def fill_latents(self, frames: dict[bytes, Frame], pool: Executor) -> dict[tuple[int, int], Store]:
        """The latents of pictures, a store for each shape."""
        shapes: dict[tuple[int, int], dict[bytes, Frame]] = {}
        for key, frame in frames.items():
            shapes.setdefault((frame.width, frame.height), {})[key] = frame
        stores = {}
        encode = partial(encode_pictures, self.teacher, pool=pool, batch=self.effort.batch)
        for (width, height), members in sorted(shapes.items()):
            store = self.open_store(f"latents-{self.teacher.vae_fingerprint}-{width}x{height}")
            title = self.title(f"encode pictures {width}x{height}")
            store.fill(members, encode, 4 * (height // 8) * (width // 8) * 2, title)
            stores[width, height] = store
        return stores

    def draw(self, listing: Listing) -> Encoded:
        """Prompts alone; the teacher draws squares."""
        size, drawing, prompts = self.framing.size, self.drawing, [pair.prompt for pair in listing.pairs]
        contexts = self.fill_contexts(prompts)
        reader, seeds = Reader(contexts.files), plan_seeds(prompts, drawing.seed)
        keys = [make_key("drawn", p, seed, *drawing.list_values()) for p, seed in zip(prompts, seeds, strict=True)]
        sketches = {}
        for key, prompt, seed in zip(keys, prompts, seeds, strict=True):
            place = contexts.find(make_key("prompt", prompt))
            if isinstance(place, tuple):
                sketches[key] = Sketch(place, seed)
        store = self.open_store(f"drawn-{self.teacher.unet_fingerprint}-{self.teacher.text_fingerprint}-{size}x{size}")
        empty = read_empty(contexts, reader)
        draw = partial(draw_latents, self.teacher, contexts=reader, empty=empty, size=size, drawing=drawing)
        store.fill(sketches, partial(draw, batch=self.effort.batch), 4 * (size // 8) ** 2 * 2, self.title("draw"))
        shape = (size, size)
        return Encoded(listing.pairs, keys, [shape] * len(keys), contexts, {shape: store})


def read_empty(contexts: Store, reader: Reader) -> torch.Tensor:
    """The empty prompt's context (1, 77, C); raises DataError when the text encoder gives none."""
    place = contexts.find(make_key("prompt", ""))
    if not isinstance(place, tuple):
        raise DataError(f"the teacher's text encoder cannot encode the empty prompt: {place}; is the checkpoint whole?")
    return reader.read([place])
