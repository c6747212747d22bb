"""From what was measured picture by picture to figures with their errors, and whether they are those of the teacher."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..diffusion import TIME_BANDS
from ..metrics.bands import NAMES
from ..metrics.kernel_distance import jackknife_distance
from ..metrics.published import frechet_distance

Row = dict[str, float]
SCORES = ("prompt_score", "clip_score")
DISTANCES = ("ssim", "perceptual", "lpips")
VERDICTS = ("perceptual", "kid_change_x1e3", "prompt_score_change")


def summarise(measured: Mapping[str, Tensor], reference: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Row:
    """One subject's figures by name, against the teacher's (`reference`) and the `real` pictures of the same prompts.

    `x_error` is the standard error of `x`; `x_change` the mean difference to the teacher, prompt by prompt. Figures
    that a subject does not have are left out.
    """
    row: Row = {}
    if "error" in measured:
        row |= relate_bands(measured["error"], measured["energy"], [f"error {low}-{high}" for low, high in TIME_BANDS])
        row["error mean"] = sum(row.values()) / len(TIME_BANDS)
        lasting = relate_bands(measured["lasting"], measured["energy"], [f"{low}" for low, _ in TIME_BANDS])
        row["lasting error"] = sum(lasting.values()) / len(TIME_BANDS)
    if "psnr" in measured:
        row["psnr"] = measured["psnr"].median().item()
        row["latent_error"] = relate(measured["latent_error"], measured["latent_energy"])
        row |= relate_bands(measured["dct_error"], measured["dct_energy"], [f"dct_{name}" for name in NAMES])
    for name in DISTANCES:
        if name in measured:
            row |= mean_with_error(name, measured[name])
    if "features" in measured and measured is not real:
        row |= compare_features(measured["features"], reference["features"], real["features"])
    if "inception" in measured and measured is not real:
        row["fid"] = frechet_distance(measured["inception"], real["inception"])
    for name in SCORES:
        if name in measured:
            row |= mean_with_error(name, measured[name])
            row |= mean_with_error(f"{name}_change", measured[name] - reference[name])
    return {name: value for name, value in row.items() if math.isfinite(value)}


def relate(error: Tensor, energy: Tensor) -> float:
    """|difference| / |reference| over all pictures; 0 where an estimate of the square is below it."""
    return (error.double().sum().clamp(min=0) / energy.double().sum().clamp(min=1e-30)).sqrt().item()


def relate_bands(error: Tensor, energy: Tensor, names: list[str]) -> Row:
    """The same by band, (n, bands)."""
    return {name: relate(error[:, i], energy[:, i]) for i, name in enumerate(names)}


def mean_with_error(name: str, values: Tensor) -> Row:
    """Mean over pictures and its standard error."""
    values = values.double()
    return {name: values.mean().item(), f"{name}_error": (values.std() / len(values) ** 0.5).item()}


def compare_features(found: Tensor, teacher: Tensor, real: Tensor) -> Row:
    """KID x 1e3 to real pictures and its change against the teacher's, each with its jackknife error."""
    own, change = jackknife_distance(found, real), jackknife_distance(found, real, than=teacher)
    figures = {"kid_x1e3": own.mean, "kid_x1e3_error": own.error}
    figures |= {"kid_change_x1e3": change.mean, "kid_change_x1e3_error": change.error}
    return {name: 1e3 * value for name, value in figures.items()}


def judge_null_band(rows: Mapping[str, Row], null: Sequence[str], others: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Per subject of `others` and figure, whether it is as near to the teacher as the farthest of the `null` rows.

    A change that is within two of its own standard errors of that passes too: the pairs cannot tell them apart.
    """
    verdicts: dict[str, dict[str, bool]] = {}
    for figure in VERDICTS:
        limits = [abs(rows[name][figure]) for name in null if figure in rows[name]]
        for name in others:
            if limits and figure in rows[name]:
                slack = 2 * rows[name].get(f"{figure}_error", 0.0) if "change" in figure else 0.0
                verdicts.setdefault(name, {})[figure] = abs(rows[name][figure]) - slack <= max(limits)
    return verdicts
