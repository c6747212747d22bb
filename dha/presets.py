"""Three settings with names, for whoever does not want to choose a number of keys."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A share of the tokens that become keys, the most there are, and the share of the schedule before the exact rest.

    From `max_tokens` on a layer's cost is linear; without it the student's own cap holds. Behind `end`, 1 for never,
    the model is left as it is: in the last steps it draws detail, where a short context errs most. As ComfyUI's
    `end_percent` it counts timesteps: samplings whose steps crowd at the end, or that begin late, have more exact ones.
    """

    token_budget: float
    max_tokens: int | None
    end: float = 1.0

    @property
    def least_timestep(self) -> float:
        """The last timestep, of 999 to 0, before the exact rest."""
        return find_timestep(self.end)

    def relate_sampling(self, step: float) -> float:
        """Time of a sampling in even steps, as a share of the unpatched model's, from that of one shortened `step`."""
        return mix_steps(self.end, step, 1.0)


def find_timestep(end: float) -> float:
    """The timestep, of 999 to 0, at a share `end` of the schedule."""
    return 999 * (1 - end)


def mix_steps(end: float, shortened: float, exact: float) -> float:
    """The mean over even steps of which a share `end` is `shortened`."""
    return end * shortened + (1 - end) * exact


NO_CAP = 1 << 30  # keys: a share of the tokens stays that share at every size

# The caps are reached at 768x768, 9216 tokens at the finest level. With a share of the tokens the error halves when the
# sides double, with a number of them it grows by two fifths: up to 2048x2048 it stays below that at 512x512.
PRESETS = {
    "quality": Preset(token_budget=0.25, max_tokens=2304, end=0.8),
    "balanced": Preset(token_budget=0.125, max_tokens=1152, end=0.9),
    "fast": Preset(token_budget=0.0625, max_tokens=512),
}
