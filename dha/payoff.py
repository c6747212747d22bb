"""Where a short context is faster than the whole one: times of single layers, measured on the user's kind of device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTHS = (320, 640, 1280)  # SD-2.1's; other widths, of which nothing is known, are not held back
# from here on a short context is used on devices without a table: on a processor from 384x384 at the finest level, on
# an accelerator from 768x768 (an estimate: its many small kernels may cost more than the attention that they spare)
UNMEASURED_TOKENS = {"cpu": 2304, "other": 9216}
WORTH = 1.02  # a gain below this is within the noise


@dataclass(frozen=True)
class LayerSpeed:
    """How many times faster a self-attention of `channels` was with a `share` of its `tokens` as keys."""

    channels: int
    tokens: int
    share: float
    speedup: float


@dataclass(frozen=True)
class Payoff:
    """What is known of one device; without rows a rule of thumb stands in."""

    rows: tuple[LayerSpeed, ...] = ()
    unmeasured_tokens: int = UNMEASURED_TOKENS["other"]

    def pays(self, tokens: int, channels: int, keys: int) -> bool:
        """Whether a layer of `tokens` gets faster with `keys` of them as keys.

        Judged by the measured layer of that width that has as many tokens or fewer and as large a share or larger:
        larger layers and smaller shares only gain more.
        """
        rows = [row for row in self.rows if row.channels == channels]
        if not rows:
            return channels not in WIDTHS or tokens >= self.unmeasured_tokens
        rows = [row for row in rows if row.tokens <= tokens and row.share * tokens >= keys - 0.5]  # shares are rounded
        if not rows:
            return False
        # A list of tuples: torch.compile leaves the graph for min's `key`, and for its generators.
        return min([(row.share, -row.tokens, row.speedup) for row in rows])[-1] >= WORTH


def choose_payoff(tables: Iterable[dict], device: str, dtype: str, own: Iterable[Sequence] = ()) -> Payoff:
    """The table of a kind of device (`cpu`, `cuda`) in `dtype` (`fp32`), in another one where that was not measured.

    `own` rows are of this very device: widths that they have are judged by them alone.
    """
    same = [table for table in tables if table["device"] == device]
    same.sort(key=lambda table: table["dtype"] != dtype)
    measured = tuple(LayerSpeed(*row) for row in own)
    widths = {row.channels for row in measured}
    shipped = (LayerSpeed(*row) for row in (same[0]["rows"] if same else ()))
    rows = (*measured, *(row for row in shipped if row.channels not in widths))
    return Payoff(rows, UNMEASURED_TOKENS.get(device, UNMEASURED_TOKENS["other"]))
