"""What training reads: latents and text embeddings of a data set, by index, from a cache on disk."""

from pathlib import Path

import torch
from torch import Tensor

from .pairs import find_pairs, load_encoded


class Corpus:
    """Encoded pairs; `read` gives batches of one bucket, nothing is kept in memory but a small index per pair.

    `empty` (1, 77, C) is the empty prompt's context; `buckets` maps a latent size (h, w) to the indices of its pairs.
    """

    def __init__(self, tensors: dict[str, Tensor], prompts: list[str], pictures: list[Path], skipped: list[str]):
        self.tensors, self.prompts, self.pictures, self.skipped = tensors, prompts, pictures, skipped
        self.empty = tensors["empty"].float()
        self.buckets = {tuple(tensors["latents"].shape[2:]): list(range(len(self)))}

    def __len__(self) -> int:
        return len(self.tensors["latents"])

    def read(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, h, w) and contexts (B, 77, C) of pairs of one bucket, both float32."""
        picks = torch.tensor(indices)
        return self.tensors["latents"][picks].float(), self.tensors["context"][picks].float()


def open_corpus(source: Path | str, teacher, cache_folder: Path, size: int) -> Corpus:
    """Find the pairs of `source`, encode what the cache does not hold yet, and open it all.

    `teacher` is a `host.Teacher`. Raises DataError when there is nothing to train on.
    """
    pairs, skipped = find_pairs(Path(source))
    tensors, broken = load_encoded(pairs, size, teacher, cache_folder)
    return Corpus(tensors, [p.prompt for p in pairs], [p.picture for p in pairs], [*skipped, *broken])
