"""The metrics at hand: ours always, those whose weights need a download when package and weights are there."""

from pathlib import Path

from torch import Tensor

from ..metrics.bands import band_energies
from ..metrics.features import load_feature_net, perceptual_distance, pool_features
from ..metrics.prompt_score import load_prompt_scorer
from ..metrics.published import find_published


def list_judges(scorer: Path | None, clip_weights: Path | None, clip_model: str) -> tuple[dict, dict[str, str]]:
    """Functions by what they need, and by name why a metric is missing.

    `alone`: (pictures, prompts) -> (b, ...); `pairs`: (pictures, reference) -> (b,); `latents`: (latents, reference) ->
    squared error and energy (n, ...). Raises FileNotFoundError for a file that was named and is not there.
    """
    net = load_feature_net()
    alone = {"features": lambda pictures, _prompts: pool_features(net, pictures)}
    pairs = {"perceptual": lambda first, second: perceptual_distance(net, first, second)}
    missing = {}
    if scorer is None:
        missing["prompt score"] = "no --scorer was given"
    else:
        alone["prompt_score"] = load_prompt_scorer(scorer).score
    published, absent = find_published(clip_weights, clip_model)
    alone |= published["alone"]
    pairs |= published["pairs"]
    return {"alone": alone, "pairs": pairs, "latents": {"latent": latent_error, "dct": band_error}}, missing | absent


def latent_error(latents: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance and energy (n,) of latents (n, 4, h, w) drawn with the same seed."""
    return (latents - reference).flatten(1).square().sum(1), reference.flatten(1).square().sum(1)


def band_error(latents: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the bands of `metrics.bands`, (n, 3)."""
    return band_energies(latents - reference), band_energies(reference)
