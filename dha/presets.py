"""Three settings with names, for whoever does not want to choose a number of keys."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A share of the tokens that become keys, and the most there are: from there on a layer's cost is linear.

    Without `max_tokens` the student's own cap holds.
    """

    token_budget: float
    max_tokens: int | None


# The caps are reached at 1024x1024: 16384 tokens at the finest level.
PRESETS = {
    "quality": Preset(token_budget=0.25, max_tokens=4096),
    "balanced": Preset(token_budget=0.125, max_tokens=2048),
    "fast": Preset(token_budget=0.0625, max_tokens=1024),
}
