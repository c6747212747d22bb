"""One self-attention alone, normed tokens in, output out: sizes at which the whole UNet does not fit, and a profile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contest import Entrant
from .model import draw_weights, import_from_pack
from .step import Size
from .subjects import TRAINED

SHARES = (0.5,)  # beside the presets': how many keys `levels = auto` may take at most


@dataclass(frozen=True)
class Layer:
    """A self-attention of SD-2.1 at a picture's size; `side` are its tokens down and across."""

    level: int
    size: Size
    batch: int
    mini: bool = False

    @property
    def side(self) -> tuple[int, int]:
        factor = 8 << self.level
        return -(-self.size.height // factor), -(-self.size.width // factor)

    @property
    def tokens(self) -> int:
        return self.side[0] * self.side[1]

    @property
    def channels(self) -> int:
        return (32 if self.mini else 320) << min(self.level, 2)

    @property
    def head(self) -> int:
        return 32 if self.mini else 64

    @property
    def embedding(self) -> int:
        return 4 * (32 if self.mini else 320)

    @property
    def labels(self) -> dict[str, Any]:
        """What the report says of it."""
        size = {"width": self.size.width, "height": self.size.height}
        return {**size, "level": self.level, "channels": self.channels, "tokens": self.tokens, "batch": self.batch}

    def work(self, keys: int) -> float:
        """Multiplications a token, but for a factor: four projections, and the attention to `keys`."""
        return float(self.batch * self.tokens * self.channels * (2 * self.channels + keys))


def build_attention(layer: Layer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """ComfyUI's own attention module with random weights."""
    import comfy.ops
    from comfy.ldm.modules.attention import CrossAttention

    sizes = {"query_dim": layer.channels, "heads": layer.channels // layer.head, "dim_head": layer.head}
    module = CrossAttention(**sizes, dtype=dtype, device="cpu", operations=comfy.ops.disable_weight_init)
    return draw_weights(module.eval().requires_grad_(False), "attention").to(device)


def build_site(layer: Layer, config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A layer of a student with random weights."""
    if config.mode == "official":
        kind, last = import_from_pack("dha.official").OfficialSite, layer.channels // layer.head
        module = kind(layer.channels, layer.embedding, last, config.sparsity)
    else:
        module = import_from_pack("dha.hybrid").HybridSite(layer.channels, layer.embedding, config)
    return draw_weights(module.eval().requires_grad_(False), "student").to(device, dtype)


def draw_tokens(layer: Layer, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normed tokens (B, N, C) and a time embedding (B, E), the same in every run."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(layer.batch, layer.tokens, layer.channels, generator=generator).to(device, dtype)
    emb = torch.randn(layer.batch, layer.embedding, generator=generator).to(device, dtype)
    return F.layer_norm(x, x.shape[-1:]), emb


def run_ceiling(attention: nn.Module, x: Tensor) -> Tensor:
    """All four projections, no mixing of tokens."""
    attention.to_q(x), attention.to_k(x)
    return attention.to_out(attention.to_v(x))


def run_strided(attention: nn.Module, x: Tensor, side: tuple[int, int]) -> Tensor:
    """Keys and values of every second row and column."""
    return attention(x, context=x.unflatten(1, side)[:, ::2, ::2].flatten(1, 2))


def run_hybrid(attention: nn.Module, site: nn.Module, x: Tensor, emb: Tensor, plan, places) -> Tensor:
    """As `dha.patch` does it inside of a block, with the same attention."""
    return site(attention, import_from_pack("nodes.kernel").attend_short, x, emb, plan, attention.heads, places)


def plan_hybrid(layer: Layer, stretch, config):
    """The plan of a layer."""
    spent = (stretch.token_budget, config.coarse_share, stretch.max_tokens)
    plan_context = import_from_pack("dha.routing").plan_context
    return plan_context(*layer.side, *spent, bool(config.router_width), config.landmarks)


def keep_places(plan, device: torch.device):
    """Where its grid, in the middle, and its landmarks stand, worked out once as a sampling does."""
    return import_from_pack("dha.places").KeptPlaces(plan, device).pick(None)


def list_stretches() -> dict[str, Any]:
    """How keys are spent, by name: as in the first half of the presets, then plain shares."""
    presets = import_from_pack("dha.presets")
    named = {name: presets.PRESETS[name].stretches[0] for name in ("balanced", "fast", "quality")}
    return named | {f"{share:g}": presets.Stretch(share, presets.NO_CAP) for share in SHARES}


def enter_layers(layer: Layer, device: torch.device, dtype: torch.dtype) -> list[Entrant]:
    """Plain attention, the ceiling, ours training-free and trained, and the peers, for a contest."""
    attention, (x, emb) = build_attention(layer, device, dtype), draw_tokens(layer, device, dtype)
    tokens, build = layer.tokens, import_from_pack("dha.config").DHAConfig
    free = import_from_pack("dha.student").FREE_CONFIG

    def enter(name: str, title: str, run: Callable[[], Tensor], keys: int) -> Entrant:
        return Entrant(name, title, run, work=layer.work(keys), family=("layer", name, layer.level, layer.batch))

    entrants = [
        enter("plain", "the layer as it is", partial(attention, x), tokens),
        enter("ceiling", "no token mixing, projections kept", partial(run_ceiling, attention, x), 0),
    ]
    for name, stretch in list_stretches().items():
        for kind, config in (("dha", free), ("student", build(**TRAINED))):
            plan, site = plan_hybrid(layer, stretch, config), build_site(layer, config, device, dtype)
            run = partial(run_hybrid, attention, site, x, emb, plan, keep_places(plan, device))
            keys = plan.coarse + plan.chosen
            title = f"{'DHA, training-free' if kind == 'dha' else 'DHA student'}, {name}, {keys} keys"
            entrants.append(enter(f"{kind}-{name}", title, run, keys))
    run = partial(run_strided, attention, x, layer.side)
    entrants.append(enter("kv2", "K/V down-sampled by 2", run, tokens // 4))
    for share in (0.5, 0.1):
        site = build_site(layer, build(mode="official", sparsity=share), device, dtype)
        title = f"published DHA, sparsity {share:g}"
        entrants.append(enter(f"official-{share:g}", title, partial(site, x, emb), int(tokens * share**2)))
    return entrants


def list_parts(attention: nn.Module, site: nn.Module, x: Tensor, emb: Tensor, plan, places) -> Iterator[tuple]:
    """Name and callable of everything a hybrid layer does, the whole layer first."""
    hybrid = import_from_pack("dha.hybrid")
    yield "layer", partial(run_hybrid, attention, site, x, emb, plan, places)
    yield "context", partial(lambda: site.build_context(x, emb, plan, places).keys)
    yield "context: gathering", partial(hybrid.take_tokens, x, None, places.grid)
    keys, values, mixing, _ = site.build_context(x, emb, plan, places)
    if site.local is not None:
        yield "local branch", partial(site.local, x, emb, plan.height, plan.width)
    if site.deltas:
        yield "corrections of q and out", lambda: site.correct("out", site.correct("q", x))
        yield "corrections of k and v", lambda: (site.correct("k", keys), site.correct("v", values))[0]
    yield "projections of q and out", lambda: attention.to_out(attention.to_q(x))
    yield "projections of k and v", lambda: (attention.to_k(keys), attention.to_v(values))[0]
    q, k, v = attention.to_q(x), attention.to_k(keys), attention.to_v(values)
    attend, options = import_from_pack("nodes.kernel").attend_short, {"n_heads": attention.heads}
    yield "attention", lambda: mixing.run(attend, q, k, v, options)[0]
    if not plan.landmarks:  # too few tokens for landmarks
        return
    landmarks = import_from_pack("dha.landmarks")
    few, some_k = (part.index_select(1, mixing.marks) for part in (q, k))
    projected = [part.tensor_split([plan.tokens], dim=1) for part in (k, v)]
    (all_k, _), (all_v, _) = projected
    near_k, near_v = (hybrid.pick_short(*part, *mixing.picks) for part in projected)
    yield (
        "attention: picking the short context",
        lambda: [hybrid.pick_short(*part, *mixing.picks) for part in projected][0],
    )
    yield "attention: to the short context", lambda: attend(q, near_k, near_v, options, None)
    yield "attention: of landmarks to all", lambda: attend(few, all_k, all_v, options, None)
    carriers = landmarks.solve_carriers(few, some_k, [few], attention.heads)
    yield "attention: the system", lambda: landmarks.solve_carriers(few, some_k, [few], attention.heads)[0]
    yield "attention: to the landmarks", lambda: attend(q, *carriers, options, None)


@torch.inference_mode()
def enter_parts(layer: Layer, trained: bool, device: torch.device, dtype: torch.dtype) -> list[Entrant]:
    """Where the time of one hybrid layer goes, preset balanced, for a contest: every part on its own."""
    free, build = import_from_pack("dha.student").FREE_CONFIG, import_from_pack("dha.config").DHAConfig
    config = build(**TRAINED) if trained else free
    plan = plan_hybrid(layer, list_stretches()["balanced"], config)
    attention, (x, emb) = build_attention(layer, device, dtype), draw_tokens(layer, device, dtype)
    site = build_site(layer, config, device, dtype)
    parts = list_parts(attention, site, x, emb, plan, keep_places(plan, device))
    return [
        Entrant(name, name, run, work=layer.work(plan.coarse), family=("part", name, trained)) for name, run in parts
    ]
