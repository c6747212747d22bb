"""What the nearest tokens say, for all tokens: detail that a short list of keys cannot carry."""

import torch.nn.functional as F
from torch import Tensor, nn

from .routing import to_picture

REACH = 3  # tokens across the neighbourhood


class LocalMix(nn.Module):
    """A small convolution beside the attention, of `rank` channels scaled by the timestep, that starts as zero."""

    def __init__(self, channels: int, embedding: int, rank: int, operations=nn):
        super().__init__()
        self.down = operations.Linear(channels, rank, bias=False)
        self.gate = operations.Linear(embedding, rank)
        self.mix = operations.Conv2d(rank, rank, REACH, padding=REACH // 2, groups=rank)
        self.up = operations.Linear(rank, channels, bias=False)

    def start(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.weight.shape[1] ** -0.5)
        nn.init.normal_(self.mix.weight, std=1 / REACH)
        for tensor in (self.gate.weight, self.gate.bias, self.mix.bias, self.up.weight):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor, emb: Tensor, height: int, width: int) -> Tensor:
        """y = W_up SiLU(conv(W_down x * (1 + W_gate SiLU(emb)))), x and y (B, height*width, C), emb (B, E)."""
        low = self.down(x) * (1 + self.gate(F.silu(emb)))[:, None]
        mixed = self.mix(to_picture(low, height, width))
        return self.up(F.silu(mixed).flatten(2).transpose(1, 2))
