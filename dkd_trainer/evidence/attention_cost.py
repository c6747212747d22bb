"""Multiply-adds of one self-attention, so that students of different kinds can be compared at the same cost."""

from dataclasses import replace

from dha.config import DHAConfig
from dha.local import REACH
from dha.routing import plan_context


def count_full(tokens: int, channels: int) -> int:
    """The teacher's: four projections, and every pair of tokens twice."""
    return 4 * tokens * channels**2 + 2 * tokens**2 * channels


def count_cost(config: DHAConfig, side: int, channels: int) -> int:
    """A student's on side x side tokens; what does not grow with the tokens is left out."""
    tokens = side * side
    if config.mode == "official":
        keys = min(max(16, int(tokens * config.sparsity)), tokens)
        external = 2 * tokens * channels**2  # as many slots over all heads as there are channels
        return external + tokens * channels + 4 * keys * channels**2 + 2 * keys**2 * channels
    routed = bool(config.router_width)
    plan = plan_context(
        side, side, config.token_budget, config.coarse_share, config.max_tokens, routed, config.landmarks
    )
    keys = plan.coarse + plan.chosen + config.memory
    blended = plan.coarse if config.blend else 0
    whole = tokens + config.memory + blended if plan.landmarks else keys  # landmarks want all tokens projected
    rows = {"q": tokens, "k": whole, "v": whole, "out": tokens}
    deltas = sum(2 * rows[name] * channels * config.rank for name in config.deltas if config.rank)
    local = tokens * config.local * (2 * channels + REACH**2)
    gathering = 2 * tokens * config.memory * channels
    projections = sum(rows.values()) * channels**2
    pairs = tokens * (keys + 2 * plan.landmarks)  # a landmark looks at all tokens, and is looked at by all of them
    return projections + deltas + local + gathering + 2 * pairs * channels + routed * tokens * channels


def match_budget(config: DHAConfig, cost: int, side: int, channels: int) -> DHAConfig:
    """The configuration with the largest token budget, in steps of a token, that costs no more than `cost`."""
    return find_largest(
        [replace(config, token_budget=k / side**2) for k in range(1, side**2 + 1)], cost, side, channels
    )


def match_sparsity(config: DHAConfig, cost: int, side: int, channels: int) -> DHAConfig:
    """The official configuration with the largest sparsity, in steps of a token, that costs no more than `cost`."""
    return find_largest([replace(config, sparsity=k / side**2) for k in range(1, side**2 + 1)], cost, side, channels)


def find_largest(configs: list[DHAConfig], cost: int, side: int, channels: int) -> DHAConfig:
    """The costliest configuration within `cost`, the first of those; the first of all if none is."""
    costs = [count_cost(config, side, channels) for config in configs]
    most = max((own for own in costs if own <= cost), default=costs[0])
    return configs[costs.index(most)]
