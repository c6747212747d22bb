"""External memory: learned tokens that stand beside real ones as keys, and gather what the picture holds."""

import torch
from torch import Tensor, nn

SHARPNESS = 2.0  # of gathering at the start: tokens have unit variance, so logits start with this standard deviation


class Memory(nn.Module):
    """M tokens of a layer, in token space before to_k and to_v: each learned, with a summary by a question of its own.

    m_j = e_j + g_j * sum_n softmax_n(s <x_n, w_j> / sqrt(C)) x_n, linear in the number of tokens; attention to a few
    learned questions as in inducing points (arXiv 1810.00825). How much a token counts lies in its key: a weight of its
    own was no better, and would need a bias in the attention call. Tokens that gather nothing were worth little.
    """

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, channels))
        self.questions = nn.Parameter(torch.empty(count, channels))
        self.gains = nn.Parameter(torch.empty(count, channels))

    def start(self) -> None:
        """Tokens of unit variance, as the norm in front of the layer makes them; summaries at full strength."""
        nn.init.normal_(self.tokens)
        nn.init.normal_(self.questions)
        nn.init.ones_(self.gains)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, M, C) for x (B, N, C)."""
        scale = SHARPNESS * x.shape[-1] ** -0.5
        # A question's logits in a row: softmax is several times as fast so. As `bmm`: `@` would transpose what it made.
        logits = scale * torch.bmm(self.questions.to(x).expand(len(x), -1, -1), x.mT)
        gathered = logits.softmax(-1) @ x
        return torch.addcmul(self.tokens.to(x), gathered, self.gains.to(x))
