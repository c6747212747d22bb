"""Does the picture show its prompt: two small contrastive heads on frozen EfficientNet and MiniLM, for emoji scenes."""

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..mini.data import Emoji, load_emoji, plan_held_out, to_tensor
from ..mini.packages import ICON_SETS
from ..mini.scenes import BACKGROUNDS, KINDS, Scene, draw_recipe
from .captions import ASPECTS, CANDIDATES, PAIRS, Parts, list_distractors, parse_caption
from .features import grid_features, load_feature_net
from .phrases import WIDTH, PhraseTable

FORMAT = "dha-prompt-scorer-1"
FILE = "prompt_scorer.safetensors"
CELLS, CHANNELS = 9, 1792


class ImageHead(nn.Module):
    """Grid features (B, 9, 1792) -> unit vectors (B, out); places share one projection: an object is known anywhere."""

    def __init__(self, width: int = 128, hidden: int = 512, out: int = 256):
        super().__init__()
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("deviation", torch.ones(CHANNELS))
        self.cell = nn.Linear(CHANNELS, width)
        self.drop = nn.Dropout(0.2)
        self.mix = nn.Linear(CELLS * width, hidden)
        self.out = nn.Linear(hidden, out)

    def forward(self, grid: Tensor) -> Tensor:
        cells = F.gelu(self.cell((grid.float() - self.mean) / self.deviation)).flatten(1)
        return F.normalize(self.out(self.drop(F.gelu(self.mix(self.drop(cells))))), dim=-1)


class TextHead(nn.Module):
    """Rows (..., 5) of a phrase table (n, 384) -> unit vectors (..., out)."""

    def __init__(self, hidden: int = 512, out: int = 256):
        super().__init__()
        self.slots = nn.ModuleList(nn.Linear(WIDTH, hidden, bias=False) for _ in Parts._fields)
        self.out = nn.Linear(hidden, out)

    def forward(self, vectors: Tensor, rows: Tensor) -> Tensor:
        hidden = 0
        for number, slot in enumerate(self.slots):
            # captions share phrases: project each phrase once
            used, where = rows[..., number].unique(return_inverse=True)
            hidden = hidden + F.embedding(where, slot(vectors[used]))
        return F.normalize(self.out(F.gelu(hidden)), dim=-1)


def weigh_aspects(similarity: Tensor, aspects: Tensor, scales: Tensor) -> Tensor:
    """Log-probability (B, 4) of column 0 of (B, 64) among the columns of each aspect (B, 63), NaN without any."""
    columns = []
    for number, scale in enumerate(scales):
        inside, logits = aspects == number, scale * similarity
        group = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(~inside, -torch.inf)], 1)
        columns.append(group.log_softmax(1)[:, 0].masked_fill(~inside.any(1), torch.nan))
    return torch.stack(columns, 1)


class PromptScorer(nn.Module):
    """Heads, the phrases they know and the scales of their similarities."""

    def __init__(self, names: Sequence[str], table: PhraseTable):
        super().__init__()
        self.image_head, self.text_head = ImageHead(), TextHead()
        # one inverse temperature per aspect: the heads are much surer of a background than of an unseen object
        self.scale = nn.Parameter(torch.full((len(ASPECTS),), 15.0).log())
        self.names, self.known, self.table = list(names), frozenset(names), table
        self.net: nn.Module | None = None

    def extract(self, images: Tensor, batch: int = 32) -> Tensor:
        """Grid features (B, 9, 1792) of pictures (B, 3, H, W) in [0, 1], on the CPU."""
        self.net = self.net or load_feature_net()
        with torch.no_grad():
            return torch.cat([grid_features(self.net, chunk) for chunk in images.cpu().split(batch)])

    @torch.no_grad()
    def compare(self, grid: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cosine similarities (B, 64) of features to captions, column 0, and 63 wrong ones; their aspects (B, 63)."""
        if len(grid) != len(captions):
            raise ValueError(f"found {len(grid)} pictures and {len(captions)} captions, expected one caption a picture")
        rows, aspects = [], []
        for caption in captions:
            parts = parse_caption(caption, self.known)
            wrong = list_distractors(parts, self.names)
            rows.append(self.table.look_up([parts, *(w for aspect in ASPECTS for w in wrong[aspect])]))
            aspects.append([number for number, aspect in enumerate(ASPECTS) for _ in wrong[aspect]])
        text = self.text_head(self.table.vectors, torch.stack(rows))
        similarity = torch.einsum("bd,bnd->bn", self.image_head(grid), text)
        return similarity, torch.tensor(aspects)

    def weigh(self, grid: Tensor, captions: Sequence[str]) -> Tensor:
        """Probabilities (B, 4) of captions by aspect, from grid features (B, 9, 1792)."""
        return weigh_aspects(*self.compare(grid, captions), self.scale.exp()).exp()

    def score_aspects(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Probability (B,) of each caption among the wrong ones of each aspect, NaN where it does not name one."""
        return dict(zip(ASPECTS, self.weigh(self.extract(images), captions).unbind(1), strict=True))

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """How well pictures (B, 3, H, W) in [0, 1] show their captions, (B,) in [0, 1]: mean of `score_aspects`.

        Raises ValueError when the number of captions is not that of the pictures.
        """
        # probabilities, not ranks: they fall as a picture degrades, before another caption wins. The mean over aspects,
        # not one softmax over all 64: there the hardest aspect (unseen objects) hides what happens to the others
        return self.weigh(self.extract(images), captions).nanmean(1)

    @torch.no_grad()
    def match(self, grid: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarity (B, n) of every picture to every caption."""
        rows = self.table.look_up([parse_caption(caption, self.known) for caption in captions])
        return self.image_head(grid) @ self.text_head(self.table.vectors, rows).T


def save_scorer(scorer: PromptScorer, path: Path) -> None:
    """Write heads, names and phrase embeddings as one safetensors file, atomically."""
    tensors = {f"heads.{k}": v.detach().contiguous() for k, v in scorer.state_dict().items()}
    tensors["phrases"] = scorer.table.vectors.half().contiguous()
    metadata = {"format": FORMAT, "names": json.dumps(scorer.names), "phrases": json.dumps(list(scorer.table.index))}
    save_file(tensors, partial := path.with_suffix(".partial"), metadata)
    os.replace(partial, path)


def load_prompt_scorer(path: Path | str) -> PromptScorer:
    """Read what `python -m dkd_trainer.metrics.prompt_score` wrote.

    Raises FileNotFoundError or ValueError when the file is missing or of another format.
    """
    advice = "train one with: python -m dkd_trainer.metrics.prompt_score --work DIR"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt scorer at {path}; {advice}")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}; {advice}")
    tensors = load_file(path)
    table = PhraseTable(json.loads(metadata["phrases"]), tensors.pop("phrases").float())
    scorer = PromptScorer(json.loads(metadata["names"]), table)
    scorer.load_state_dict({k.removeprefix("heads."): v for k, v in tensors.items()})
    return scorer.eval().requires_grad_(False)


def plan_scenes(emoji: Emoji, count: int) -> list[Scene]:
    """Training scenes of all kinds in turn, single objects twice as often."""
    kinds, rng = ["one", *KINDS], random.Random("a")
    return [draw_recipe(rng, emoji.train, kinds[i % len(kinds)]) for i in range(count)]


def extract_scenes(emoji: Emoji, scenes: list[Scene], path: Path, batch: int = 32) -> Tensor:
    """Grid features (n, 9, 1792) in fp16 of scenes, kept in a file with the recipes they belong to."""
    recipes = json.dumps([scene.to_json() for scene in scenes])
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("recipes") == recipes:
                return file.get_tensor("grid")
    net, chunks = load_feature_net(), []
    with torch.no_grad():
        for start in tqdm(range(0, len(scenes), batch), desc=path.stem):
            pictures = to_tensor(np.stack([emoji.draw(scene) for scene in scenes[start : start + batch]]))
            chunks.append(grid_features(net, pictures).half())
    save_file({"grid": torch.cat(chunks)}, partial := path.with_suffix(".partial"), {"recipes": recipes})
    os.replace(partial, path)
    return torch.cat(chunks)


def draw_negatives(rows: Tensor, table: PhraseTable, names: Tensor) -> Tensor:
    """Wrong captions (B, 6, 5) for captions (B, 5): style, background, each object, order, arrangement."""
    index = table.index
    single, second = rows[:, 1] == index[""], (rows[:, 1] != index[""]).long()
    # another style or background: one of a caption of the batch, which may be the same and is then left out of the loss
    wrong = rows[:, None].repeat(1, 6, 1)
    for number, slot in enumerate((3, 4)):
        wrong[:, number, slot] = rows[torch.randperm(len(rows)), slot]
    others = names[torch.randint(len(names), (2, len(rows)))]
    wrong[:, 2, 0] = others[0]
    wrong[:, 3].scatter_(1, second[:, None], others[1][:, None])
    switched = torch.where(rows[:, 2] == index["one"], index["mirrored"], index["one"])
    pairs = torch.tensor([index[kind] for kind in PAIRS])
    wrong[:, 4:, 2] = torch.where(single, switched, rows[:, 2])[:, None]
    wrong[:, 4, :2] = torch.where(single[:, None], rows[:, :2], rows[:, :2].flip(1))
    wrong[:, 5, 2] = torch.where(single, switched, pairs[torch.randint(len(pairs), (len(rows),))])
    return wrong


def train_heads(
    scorer: PromptScorer, grid: Tensor, labels: Tensor, words: Tensor, steps: int, batch: int = 192
) -> None:
    """Contrastive training on grid features (n, 9, 1792) and caption rows (n, 5) with labels or with search words."""
    scorer.image_head.mean.copy_(grid.float().mean((0, 1)))
    scorer.image_head.deviation.copy_(grid.float().std((0, 1)).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(scorer.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.1)
    names, target = labels[:, :2].unique(), torch.arange(batch)
    names = names[names != scorer.table.index[""]]
    scorer.train()
    for _ in (bar := tqdm(range(steps), desc="train heads", mininterval=5)):
        picks = torch.randint(len(grid), (batch,))
        rows = torch.where(torch.rand(batch, 1) < 0.3, words[picks], labels[picks])
        wrong = draw_negatives(rows, scorer.table, names)
        images = scorer.image_head(grid[picks])
        text = scorer.text_head(scorer.table.vectors, torch.cat([rows[:, None], wrong], 1))
        within = images @ text[:, 0].T
        hard = torch.einsum("bd,bnd->bn", images, text[:, 1:]).masked_fill((wrong == rows[:, None]).all(-1), -1e4)
        scale = scorer.scale.mean().exp()
        loss = F.cross_entropy(scale * torch.cat([within, hard], 1), target)
        loss = loss + F.cross_entropy(scale * within.T, target) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    scorer.eval().requires_grad_(False)


def calibrate(scorer: PromptScorer, grid: Tensor, captions: Sequence[str]) -> None:
    """Set the scale of each aspect that makes the right captions of held-out pictures most likely."""
    similarity, aspects = scorer.compare(grid, captions)
    scales = torch.logspace(-0.5, 2, 101)
    losses = [-weigh_aspects(similarity, aspects, scale.expand(len(ASPECTS))).nanmean(0) for scale in scales]
    scorer.scale.copy_(scales[torch.stack(losses).argmin(0)].log())


def report_quality(scorer: PromptScorer, grid: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Retrieval among 64 captions, score of right (ceiling) and shuffled captions (floor), share right by aspect."""
    groups = range(0, len(grid) - CANDIDATES + 1, CANDIDATES)
    tables = [scorer.match(grid[i : i + CANDIDATES], captions[i : i + CANDIDATES]) for i in groups]
    ranks = torch.cat([(table > table.diagonal()[:, None]).sum(1) for table in tables])
    similarity, aspects = scorer.compare(grid, captions)
    right, shuffled = scorer.weigh(grid, captions), scorer.weigh(grid, [*captions[1:], captions[0]])
    report = {"R@1": (ranks < 1).float().mean(), "R@5": (ranks < 5).float().mean()}
    report |= {"score, real pictures": right.nanmean(1).mean(), "score, shuffled captions": shuffled.nanmean(1).mean()}
    for number, aspect in enumerate(ASPECTS):
        best = similarity[:, 1:].masked_fill(aspects != number, -torch.inf).amax(1)
        report |= {f"{aspect}, real": right[:, number].nanmean(), f"{aspect}, shuffled": shuffled[:, number].nanmean()}
        report[f"{aspect}, share right"] = (similarity[:, 0] > best)[best.isfinite()].float().mean()
    return {name: round(value.item(), 4) for name, value in report.items()}


def main() -> None:
    """Train, calibrate, save and report."""
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer.metrics.prompt_score", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the emoji art, where the scorer goes")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.manual_seed(0)
    emoji = load_emoji(args.work)
    scenes, held_out = plan_scenes(emoji, args.scenes), plan_held_out(emoji, 768, seed=7)
    grid = extract_scenes(emoji, scenes, args.work / "prompt_train.safetensors")
    unseen = extract_scenes(emoji, held_out, args.work / "prompt_held_out.safetensors")
    names = sorted({concept.label for concept in emoji.concepts})
    scorer = PromptScorer(names, PhraseTable())
    # everything a label caption can hold is embedded now, so that the finished scorer needs no MiniLM for those
    scorer.table.add([*names, *ICON_SETS, *BACKGROUNDS, *KINDS, ""])
    keep = len(scorer.table.index)
    labels, words = (
        scorer.table.look_up([parse_caption(emoji.caption(scene, source), scorer.known) for scene in scenes])
        for source in (None, random.Random(1))
    )
    train_heads(scorer, grid, labels, words, args.steps)
    captions = [emoji.caption(scene) for scene in held_out]
    calibrate(scorer, unseen[:256], captions[:256])
    scorer.table = PhraseTable(list(scorer.table.index)[:keep], scorer.table.vectors[:keep])
    save_scorer(scorer, args.work / FILE)
    print(json.dumps(report_quality(scorer, unseen[256:], captions[256:]), indent=1))


if __name__ == "__main__":
    main()
