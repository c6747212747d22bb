"""Tables of figures: which columns there are, and how a figure is written with its error."""

from typing import NamedTuple

from ..diffusion import TIME_BANDS
from ..metrics.bands import NAMES
from .summary import Row


class Column(NamedTuple):
    """A column of a table: figure `key`, with its standard error for changes, for KID and where `spread` says so."""

    title: str
    key: str
    digits: str = ".3g"
    spread: bool = False


ERROR = Column("error", "error mean", ".4f")
PERCEPTUAL = Column("perceptual", "perceptual", ".3f")
QUALITY = (
    Column("training s", "train_seconds", ".0f"),
    Column("steps", "train_steps", ".0f"),
    Column("attention cost", "attention_cost", ".1%"),
    ERROR,
    Column("lasting", "lasting error", ".4f"),
    Column("latents", "latent_error", ".3f"),
    Column("PSNR", "psnr", ".1f"),
    Column("SSIM", "ssim", ".3f"),
    PERCEPTUAL,
    Column("LPIPS", "lpips", ".3f"),
    Column("KID", "kid_x1e3", ".1f"),
    Column("change", "kid_change_x1e3", "+.1f"),
    Column("FID", "fid", ".1f"),
    Column("prompt", "prompt_score", ".3f"),
    Column("change", "prompt_score_change", "+.3f"),
    Column("CLIP", "clip_score", ".2f"),
    Column("change", "clip_score_change", "+.2f"),
)
TIMESTEPS = tuple(Column(f"{low}-{high}", f"error {low}-{high}", ".4f") for low, high in TIME_BANDS)
FREQUENCIES = tuple(Column(f"DCT {name}", f"dct_{name}", ".3f") for name in NAMES)


def tabulate(rows: dict[str, Row], columns: tuple[Column, ...]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table; columns and subjects without any figure are left out."""
    used = [column for column in columns if any(column.key in row for row in rows.values())]
    cells = [
        [name, *(write_figure(row, column) for column in used)]
        for name, row in rows.items()
        if any(column.key in row for column in used)
    ]
    return ["", *(column.title for column in used)], cells


def write_figure(row: Row, column: Column) -> str:
    """A figure with its error, or a dash."""
    if column.key not in row:
        return "-"
    spread = column.spread or "change" in column.key or "kid" in column.key
    error = row.get(f"{column.key}_error") if spread else None
    behind = "" if error is None else f" ± {error:{column.digits.lstrip('+')}}"
    return f"{row[column.key]:{column.digits}}{behind}"
