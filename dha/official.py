"""Published DHA, exactly: sparse attention on routed tokens plus external attention (for compatibility only)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUTINGS = ("dynamic", "static")


class ExternalAttention(nn.Module):
    """Attention to M learned slots per head, normalised over tokens, then over slots; state names as published."""

    def __init__(self, channels: int, heads: int, slots: int, operations=nn):
        super().__init__()
        self.heads, self.slots = heads, slots
        self.k = nn.Parameter(torch.empty(heads * slots, channels, 1, 1))
        self.v = nn.Parameter(torch.empty(channels, heads * slots, 1, 1))
        self.norm = operations.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C): A = softmax_N(K u / sqrt(M)), L1-normalised over a head's slots, then V A."""
        logits = F.linear(self.norm(x), self.k.flatten(1).to(x)) * self.slots**-0.5
        slots = logits.softmax(dim=1).unflatten(-1, (self.heads, self.slots))
        slots = slots / (slots.sum(-1, keepdim=True) + 1e-6)
        return F.linear(slots.flatten(2), self.v.flatten(1).to(x))


class SparseAttention(nn.Module):
    """Plain multi-head self-attention with the published names."""

    def __init__(self, channels: int, heads: int, operations=nn):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (operations.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, k, C) -> (B, k, C)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OfficialSite(nn.Module):
    """One published DHA layer: y = EA(x) + sigmoid(alpha) * scatter(SA(chosen tokens)).

    `routing` is `dynamic` (scores <x_n, LN(g(t))>) or `static` (the first tokens).
    """

    def __init__(
        self, channels: int, embedding: int, heads: int, sparsity: float = 0.5, routing: str = "dynamic", operations=nn
    ):
        super().__init__()
        if routing not in ROUTINGS:
            raise ValueError(f"routing is {routing!r}, expected one of {ROUTINGS}")
        self.sparsity, self.routing = sparsity, routing
        self.sa_attn = SparseAttention(channels, heads, operations)
        self.ea_attn = ExternalAttention(channels, heads, channels // heads, operations)
        self.gating_network = nn.Sequential(
            operations.Linear(embedding, 64), nn.SiLU(), operations.Linear(64, channels)
        )
        self.global_alpha = nn.Parameter(torch.empty(()))

    def choose(self, x: Tensor, emb: Tensor) -> Tensor:
        """Indices (B, k) of the chosen tokens, best first, k = max(16, N * sparsity) and at most N."""
        keys = min(max(16, int(x.shape[1] * self.sparsity)), x.shape[1])
        if self.routing == "static":
            return torch.arange(keys, device=x.device).expand(len(x), -1)
        gate = self.gating_network(emb)
        gate = F.layer_norm(gate.float(), gate.shape[-1:]).to(x.dtype)
        return torch.einsum("bnc,bc->bn", x, gate).topk(keys, dim=1).indices

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        """(B, N, C) at time embedding (B, E) -> (B, N, C); without an embedding, plain self-attention."""
        if emb is None:
            return self.sa_attn(x)
        index = self.choose(x, emb)[..., None].expand(-1, -1, x.shape[-1])
        found = self.sa_attn(x.gather(1, index)).to(x.dtype)  # autocast lowers it, and scatter promotes nothing
        sparse = torch.zeros_like(x).scatter(1, index, found)
        return self.ea_attn(x) + self.global_alpha.to(x).sigmoid() * sparse
