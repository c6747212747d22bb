"""Three settings with names, for whoever does not want to choose a number of keys."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A share of the tokens that become keys, the most there are, and the share of the sampling before the exact rest.

    From `max_tokens` on a layer's cost is linear; without it the student's own cap holds. Behind `end`, 1 for never,
    the model is left as it is: in the last steps it draws detail, where a short context errs most.
    """

    token_budget: float
    max_tokens: int | None
    end: float = 1.0

    @property
    def least_timestep(self) -> float:
        """The last timestep, of 999 to 0, before the exact rest."""
        return 999 * (1 - self.end)

    def relate_sampling(self, step: float) -> float:
        """Time of a whole sampling relative to the unpatched model's, from that of one shortened `step`."""
        return self.end * step + 1 - self.end


# The caps are reached at 1024x1024: 16384 tokens at the finest level.
PRESETS = {
    "quality": Preset(token_budget=0.25, max_tokens=4096, end=0.7),
    "balanced": Preset(token_budget=0.125, max_tokens=2048, end=0.9),
    "fast": Preset(token_budget=0.0625, max_tokens=1024),
}
