"""Pairs that training never saw: what every subject of an evaluation is drawn from and compared with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.corpus import Corpus, open_corpus
from ..data.pairs import list_source
from ..data.source import DataError


@dataclass(frozen=True)
class HeldOut:
    """Latents (n, 4, h, w), contexts (n, 77, C), the empty prompt's (1, 77, C), prompts and pictures, uint8.

    `identity` names these very pairs.
    """

    latents: Tensor
    context: Tensor
    empty: Tensor
    prompts: list[str]
    pictures: Tensor
    identity: str

    def __len__(self) -> int:
        return len(self.latents)


def open_held_out(folder: Path, teacher, cache: Path, size: int, skip: int = 0, count: int = 256) -> HeldOut:
    """`count` pairs of a folder after the first `skip`: disjoint ranges choose a student and report it.

    `teacher` is a `host.Teacher`. Raises DataError when the folder holds fewer pairs.
    """
    corpus = open_enough(folder, teacher, cache, size, skip + count)
    if len(corpus) < skip + count or count < 4:
        raise DataError(
            f"{folder} holds {len(corpus)} usable pairs, expected {skip + count} (--skip {skip}, --count {count}; at "
            "least 4); give fewer or write more pairs"
        )
    picks = list(range(skip, skip + count))
    latents, context = corpus.read(picks)
    prompts = [corpus.prompts[i] for i in picks]
    pictures = torch.stack([to_bytes(corpus.read_picture(i)) for i in picks])
    return HeldOut(latents, context, corpus.empty, prompts, pictures, name_tensors([latents, context], prompts))


def open_enough(folder: Path, teacher, cache: Path, size: int, count: int) -> Corpus:
    """A corpus of `count` usable pairs, or of all there are: the next ones come in for what cannot be used.

    Raises DataError when none can be used.
    """
    listed, limit = len(list_source(folder).pairs), count
    while True:
        try:
            corpus = open_corpus(folder, teacher, cache, size, limit=limit)
            missing = count - len(corpus)
        except DataError:
            if limit >= listed:
                raise
            missing = count
        if missing <= 0 or limit >= listed:
            return corpus
        limit += missing


def to_bytes(pictures: Tensor) -> Tensor:
    """[0, 1] -> uint8, as a saved picture has it: all comparisons are between those."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def name_tensors(tensors: Sequence[Tensor], texts: Sequence[str] = ()) -> str:
    """A short hash of values and texts."""
    digest = hashlib.sha256(repr(list(texts)).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
