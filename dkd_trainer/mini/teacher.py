"""Train the mini teacher's UNet and text encoder together on cached latents of emoji scenes."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..diffusion import add_noise, sample_euler, to_noise, training_target
from ..engine.schedule import load_state, save_state, trapezoid_rate
from .autoencoder import decode, encode
from .data import CHUNKS, Emoji, chunk_path, encode_scenes, load_chunk, plan_chunk, plan_held_out
from .model import Tokens, build_text_encoder, build_unet, encode_text

RATE = 5e-4


def attend_small(_attention, q, k, v, heads, *_args, **_kwargs):
    """Attention by two matrix products, (B, N, C): a CPU's backward is faster than SDPA's at few tokens."""
    width = q.shape[-1] // heads
    q, k, v = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v))
    weights = (q * width**-0.5 @ k.transpose(-1, -2)).softmax(-1, dtype=q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


class MiniTeacher(nn.Module):
    """UNet and text encoder with one forward: noisy latents, timesteps and prompt tokens in, v-prediction out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet, self.text = build_unet(), build_text_encoder()

    def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        context = encode_text(self.text, tokens)
        options = {"optimized_attention_override": attend_small} if torch.is_grad_enabled() else {}
        return self.unet(x, t.float(), context=context, transformer_options=options).float()


class Corpus:
    """Latents of training scenes and their captions; grows by one encoded chunk at a time."""

    def __init__(self, emoji: Emoji, autoencoder: nn.Module, work: Path):
        self.emoji, self.work = emoji, work
        self.encode = lambda images: encode(autoencoder, images)
        self.latents, self.scenes, self.chunks = torch.empty(0, 4, 16, 16), [], 0

    def has_next(self) -> bool:
        """Whether the next chunk has been encoded before."""
        return chunk_path(self.emoji, self.chunks, self.work).exists()

    def grow(self) -> None:
        self.latents = torch.cat([self.latents, load_chunk(self.emoji, self.chunks, self.encode, self.work)])
        self.scenes += plan_chunk(self.emoji, self.chunks)
        self.chunks += 1

    def draw(self, rng: random.Random, batch: int) -> tuple[torch.Tensor, list[str]]:
        """Latents (B, 4, 16, 16) and captions, one in ten empty for classifier-free guidance."""
        picks = rng.sample(range(len(self.scenes)), batch)
        captions = ["" if rng.random() < 0.1 else self.emoji.caption(self.scenes[i], rng) for i in picks]
        return self.latents[picks], captions


class HeldOut:
    """Fixed held-out scenes, noise and timesteps: the same numbers every time the loss is taken."""

    def __init__(self, corpus: Corpus, tokens: Tokens, count: int = 256):
        scenes = plan_held_out(corpus.emoji, count)
        generator = torch.Generator().manual_seed(1)
        self.captions = [corpus.emoji.caption(s) for s in scenes]
        self.tokens, self.empty = tokens(self.captions), tokens([""])
        self.latents = encode_scenes(corpus.emoji, scenes, corpus.encode)
        self.noise = torch.randn(self.latents.shape, generator=generator)
        self.t = torch.randint(0, 1000, (count,), generator=generator)

    @torch.inference_mode()
    def loss(self, model: MiniTeacher) -> float:
        losses = []
        for i in range(0, len(self.t), 64):
            part = slice(i, i + 64)
            noisy = add_noise(self.latents[part], self.noise[part], self.t[part])
            with torch.autocast("cpu", torch.bfloat16):
                prediction = model(noisy, self.t[part], self.tokens[part])
            target = training_target(self.latents[part], self.noise[part], self.t[part], "v")
            losses.append(F.mse_loss(prediction, target))
        return torch.stack(losses).mean().item()

    @torch.inference_mode()
    def sheet(self, model: MiniTeacher, autoencoder: nn.Module, path: Path, count: int = 24, cfg: float = 4.0) -> None:
        """Save pictures of the first held-out prompts, 25 Euler steps with guidance, 12 a row."""
        tokens = torch.cat([self.tokens[:count], self.empty.repeat(count, 1)])

        def predict(x, t):
            doubled, times = torch.cat([x, x]), torch.cat([t, t])
            with torch.autocast("cpu", torch.bfloat16):
                prediction = model(doubled, times, tokens)
            cond, empty = to_noise(prediction, doubled, times, "v").chunk(2)
            return empty + cfg * (cond - empty)

        pictures = decode(autoencoder, sample_euler(predict, self.noise[:count]))
        rows = (pictures * 255).byte().permute(0, 2, 3, 1).numpy()
        rows = [np.concatenate(list(rows[i : i + 12]), axis=1) for i in range(0, count, 12)]
        Image.fromarray(np.concatenate(rows)).save(path)


def draw_times(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (B,), most of them where shapes are decided: logit-normal (arXiv 2403.03206, section 3.1)."""
    return (1000 * torch.randn(batch, generator=generator).sigmoid()).long().clamp(max=999)


def train_teacher(
    emoji: Emoji, autoencoder: nn.Module, work: Path, steps: int, batch: int = 64, chunks: int = CHUNKS
) -> MiniTeacher:
    """Train up to `steps`; resumes from `teacher.pt`, keeps the weights best on held-out pairs in `best.pt`."""
    model, average, tokens = MiniTeacher(), MiniTeacher(), Tokens()
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    corpus, first, best, log = Corpus(emoji, autoencoder, work), 0, float("inf"), work / "teacher.log"
    if state := load_state(work / "teacher.pt"):
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        if state.get("groups") == list(emoji.groups):  # other groups, other held-out pairs: scores do not compare
            best = state["best"]
    held_out, running = HeldOut(corpus, tokens), 0.0
    while corpus.chunks < min(chunks, 2) or (corpus.chunks < chunks and corpus.has_next()):
        corpus.grow()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="teacher", disable=first >= steps)
    for step in bar:
        if step % 100 == 99 and corpus.chunks < chunks:
            corpus.grow()
        for group in optimizer.param_groups:
            group["lr"] = RATE * trapezoid_rate(step, steps)
        latents, captions = corpus.draw(random.Random(f"batch {step}"), batch)
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(latents.shape, generator=generator)
        t = draw_times(batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(add_noise(latents, noise, t), t, tokens(captions))
        loss = F.mse_loss(prediction, training_target(latents, noise, t, "v"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", scenes=len(corpus.scenes), refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            score = held_out.loss(average)
            with log.open("a") as file:
                file.write(f"{step + 1}\t{running:.5f}\t{score:.5f}\n")
            if score < best:
                best = score
                save_state(work / "best.pt", {"model": average.state_dict(), "step": step + 1, "held_out": score})
            parts = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(work / "teacher.pt", {**parts, "step": step + 1, "best": best, "groups": list(emoji.groups)})
            held_out.sheet(average, autoencoder, work / "sheet.png")
    return average
