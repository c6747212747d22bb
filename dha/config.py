"""What a DHA student is made of, as validated plain values that travel in its file."""

import dataclasses
import json
from dataclasses import dataclass

LEVELS = 4
MODES = ("hybrid", "official")
NORM_GROUPS = 32  # of every transformer in SD-2.x
GROUPS = (1, 2, 4, 8, 16, 32)  # that a norm of SD-2.x's widths can have
DELTAS = ("q", "k", "v", "out")
RETIRED = {"weighted": False, "gather": True}  # settings that older files have, with the only value that counts


class ConfigError(ValueError):
    """A configuration value is missing, unknown or out of range; the message names it."""


@dataclass(frozen=True)
class DHAConfig:
    """One student: where self-attention is replaced and by how much.

    `levels` are UNet resolutions, 0 the finest. `token_budget` is the share of a level's tokens that become keys, at
    most `max_tokens` of them; `coarse_share` of the keys form the strided grid, the router picks the others. About
    `landmarks` queries of a level, more beside many keys, look at all keys and tell the others what they miss, see
    `dha.landmarks`. `memory` learned tokens, which also hold summaries of the picture, low-rank `deltas` of `rank`, a
    router of `router_width`, a convolution of `local` channels beside the attention and a `blend` of grid tokens with
    the means of their cells are the trained parts; 0 or false leaves one out.
    `sparsity` and `norm_groups`, those of the GroupNorm in front of each transformer, belong to mode `official`.
    """

    mode: str = "hybrid"
    levels: tuple[int, ...] = (0,)
    token_budget: float = 0.125
    max_tokens: int = 4096
    coarse_share: float = 0.8
    landmarks: int = 0
    memory: int = 0
    rank: int = 0
    deltas: tuple[str, ...] = DELTAS
    router_width: int = 0
    local: int = 0
    blend: bool = False
    sparsity: float = 0.5
    norm_groups: int = NORM_GROUPS

    def __post_init__(self):
        for name in ("levels", "deltas"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(self.mode in MODES, "mode", self.mode, f"one of {MODES}")
        require(
            bool(self.levels)
            and all(isinstance(v, int) and 0 <= v < LEVELS for v in self.levels)
            and len(set(self.levels)) == len(self.levels),
            "levels",
            self.levels,
            f"different whole numbers from 0 (finest) to {LEVELS - 1}",
        )
        for name in ("token_budget", "sparsity"):
            require(
                is_number(getattr(self, name)) and 0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]"
            )
        share = self.coarse_share
        require(is_number(share) and 0 <= share <= 1, "coarse_share", share, "in [0, 1]")
        for name in ("landmarks", "memory", "rank", "router_width", "local"):
            value = getattr(self, name)
            require(type(value) is int and 0 <= value <= 4096, name, value, "a whole number from 0 to 4096")
        require(
            type(self.max_tokens) is int and self.max_tokens >= 1, "max_tokens", self.max_tokens, "a whole number >= 1"
        )
        groups = self.norm_groups
        require(type(groups) is int and groups in GROUPS, "norm_groups", groups, "a power of 2 up to 32")
        require(
            self.mode == "official" or groups == NORM_GROUPS, "norm_groups", groups, f"{NORM_GROUPS} in mode 'hybrid'"
        )
        require(type(self.blend) is bool, "blend", self.blend, "true or false")
        require(set(self.deltas) <= set(DELTAS), "deltas", self.deltas, f"a selection of {DELTAS}")

    def to_json(self) -> str:
        """The configuration as one line of JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "DHAConfig":
        """Read `to_json`'s form back; raises ConfigError for anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the DHA configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"the DHA configuration is {type(values).__name__}, expected an object")
        values = drop_retired(values)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown DHA setting(s) {unknown}; known are {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"a DHA setting has the wrong type: {error}") from error


def drop_retired(values: dict) -> dict:
    """Settings of a file without those that are gone, where they had the only value that still counts.

    Where there is no memory none gathers, whatever the file says. Raises ConfigError for memory that is to gather
    nothing.
    """
    kept = {name: value for name, value in values.items() if value is not RETIRED.get(name, ...)}
    if kept.get("gather") is False:
        require(not kept.get("memory"), "gather", False, "true: memory tokens that gather nothing are gone; train anew")
        del kept["gather"]
    return kept


def require(holds: bool, name: str, found: object, expected: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not holds:
        raise ConfigError(f"DHA setting {name!r} is {found!r}, expected {expected}")


def is_number(value: object) -> bool:
    """Whether a value is an int or float, bool excluded."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
