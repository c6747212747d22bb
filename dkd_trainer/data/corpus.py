"""What training reads: latents and text embeddings of a data set, by index, from a cache on disk."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from dha.whole_file import write_whole

from .buckets import Framing
from .cache import Reader
from .drawing import Drawing
from .encoder import Effort, Encoded, Encoder, read_empty
from .pairs import list_source
from .pictures import cut_picture, decode_picture
from .source import DataError, Listing, Pair, Skip, count_reasons, name_source


class Corpus:
    """Encoded pairs; `read` gives batches of one bucket; in memory are names, prompts and where the tensors lie.

    `identity` names content and order, wherever the pairs lie. `empty` (1, 77, C) is the empty prompt's context,
    `skipped` what is left out and why, `report` the file with its list if there is one, `made` the latents that this
    very process had to make. It can be copied to other processes.
    """

    def __init__(self, listing: Listing, encoded: Encoded):
        self.source = listing.source
        self.report: Path | None = None
        self.made = sum(store.made for store in encoded.latents.values())
        shapes = sorted(encoded.latents)
        found = list(encoded.locate())
        self.pairs: list[Pair] = [pair for pair, *_ in found]
        self.identity = name_pairs([(pair.prompt, key) for pair, key, *_ in found])
        self.skipped: list[Skip] = [*listing.skipped, *encoded.skipped]
        # bucket, shard and row of the latent, shard and row of the context
        rows = [(shapes.index(shape), *latent, *context) for *_, shape, latent, context in found]
        self.places = np.array(rows, np.int32).reshape(-1, 5)
        self.sizes = [(height // 8, width // 8) for width, height in shapes]
        self.latents = [Reader(encoded.latents[shape].files) for shape in shapes]
        self.contexts = Reader(encoded.contexts.files)
        self.empty = read_empty(encoded.contexts, self.contexts)

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def buckets(self) -> dict[tuple[int, int], list[int]]:
        """Latent size (h, w) -> the indices of its pairs."""
        members = (np.flatnonzero(self.places[:, 0] == number).tolist() for number in range(len(self.sizes)))
        return {size: indices for size, indices in zip(self.sizes, members, strict=True) if indices}

    @cached_property
    def prompts(self) -> list[str]:
        return [pair.prompt for pair in self.pairs]

    @cached_property
    def pictures(self) -> list[Path | None]:
        """The files of the pictures: a shard holds many, drawn latents have none; `read_picture` reads them all."""
        return [pair.picture for pair in self.pairs]

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, h, w) and contexts (B, 77, C) of pairs of one bucket, float32 and the caller's own.

        Raises ValueError for none and for pairs of several buckets.
        """
        places = self.places[np.asarray(indices, np.int64)].tolist()
        buckets = {place[0] for place in places}
        if len(buckets) != 1:
            raise ValueError(
                f"a batch of {len(places)} pairs has {len(buckets)} latent sizes, expected one bucket's pairs"
            )
        latents = self.latents[buckets.pop()].read(place[1:3] for place in places)
        return latents, self.contexts.read(place[3:] for place in places)

    def read_picture(self, index: int) -> Tensor:
        """A pair's picture (3, H, W) in [0, 1] as it was encoded; raises DataError where there is none."""
        height, width = self.sizes[self.places[index, 0]]
        return cut_picture(decode_picture(self.pairs[index].read_bytes()), width * 8, height * 8)

    def describe(self) -> str:
        """What is there and what was skipped, in a line."""
        sizes = ", ".join(f"{len(members)} of {w * 8}x{h * 8}" for (h, w), members in self.buckets.items())
        skipped = f"; skipped: {count_reasons(self.skipped)}" if self.skipped else ""
        return f"{len(self)} pairs in {self.source} ({sizes}){skipped}" + (
            f"; see {self.report}" if self.report else ""
        )


def name_pairs(pairs: Sequence[tuple[str, bytes]]) -> str:
    """How many pairs (prompt, key of the latent) there are, and a short hash of them in order.

    A key stands for a picture's content and how it was cut, or for how a latent was drawn.
    """
    digest = hashlib.sha256()
    for prompt, key in pairs:
        digest.update(prompt.encode() + b"\0" + key)
    return f"{len(pairs)}, {digest.hexdigest()[:8]}"


def open_corpus(
    source: Path | str,
    teacher,
    cache_folder: Path,
    size: int,
    *,
    step: int = 64,
    max_ratio: float = 1.0,
    min_side: int | None = None,
    limit: int | None = None,
    drawing: Drawing | None = None,
    effort: Effort | None = None,
) -> Corpus:
    """Find the pairs of a source, encode what the cache does not hold yet, and open it all.

    `source` is a folder of pictures with prompts, .tar shards as a pattern, or a .txt of prompts that the teacher (a
    `host.Teacher`) draws for. `size`, `step`, `max_ratio` and `min_side` are those of `buckets.Framing`; `limit` takes
    the first pairs only. Several processes may do this at once and share the work.

    Raises DataError when there is nothing to train on or the cache cannot be written.
    """
    framing = Framing(size, step, max_ratio, min_side)
    return encode_listing(list_source(source, limit), teacher, cache_folder, framing, drawing, effort)


def encode_listing(
    listing: Listing,
    teacher,
    cache_folder: Path,
    framing: Framing,
    drawing: Drawing | None = None,
    effort: Effort | None = None,
) -> Corpus:
    """A corpus of pairs that are listed already; as `open_corpus`."""
    encoder = Encoder(teacher, Path(cache_folder), framing, drawing or Drawing(), effort or Effort())
    drawn = all(pair.picture is None for pair in listing.pairs)
    corpus = Corpus(listing, encoder.draw(listing) if drawn else encoder.encode(listing))
    if not corpus.pairs:
        raise DataError(
            f"none of the {len(listing.pairs)} pairs in {listing.source} is usable: {count_reasons(corpus.skipped)}; "
            f"the first: {corpus.skipped[0]}"
        )
    corpus.report = write_report(Path(cache_folder), corpus)
    return corpus


def write_report(folder: Path, corpus: Corpus) -> Path | None:
    """Everything that was skipped, by reason, as a text file in the cache; None when there is nothing."""
    path = folder / f"skipped-{name_source(corpus.source)}.txt"
    if not corpus.skipped:
        path.unlink(missing_ok=True)
        return None
    lines = [f"{corpus.source}: {count_reasons(corpus.skipped)}", ""]
    lines += [str(skip) for skip in sorted(corpus.skipped, key=lambda skip: (skip.reason, skip.name))]
    write_whole(path, "\n".join([*lines, ""]).encode(errors="replace"))
    return path
