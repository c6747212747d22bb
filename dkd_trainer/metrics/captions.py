"""Captions of emoji scenes taken apart, and wrong captions that differ from a right one in one aspect."""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..mini.packages import ICON_SETS
from ..mini.scenes import BACKGROUNDS

CANDIDATES = 64
ASPECTS = ("style", "background", "arrangement", "objects")
PAIRS = ("left", "above", "checkerboard")
ARRANGEMENTS = {"left": r"(.+?) left of (.+)", "above": r"(.+?) above (.+)", "mirrored": "two mirrored (.+)()"}


class Parts(NamedTuple):
    """A caption taken apart; MiniLM's embedding of a whole caption hardly knows left from right."""

    first: str
    second: str = ""
    kind: str = ""
    style: str = ""
    background: str = ""


def parse_caption(caption: str, names: set[str] | frozenset[str] = frozenset()) -> Parts:
    """Read `red apple left of rocket, noto style, pink background`; anything else becomes one object without the rest.

    `names` are known objects: they tell where `checkerboard of bow and arrow and dango` comes apart.
    """
    whole = re.fullmatch(r"(.+), (.+) style, (.+) background", caption)
    if not whole:
        return Parts(caption)
    subject, style, background = whole.groups()
    for kind, pattern in ARRANGEMENTS.items():
        if found := re.fullmatch(pattern, subject):
            return Parts(found[1], found[2], kind, style, background)
    words = subject.removeprefix("checkerboard of ").split(" and ")
    if subject.startswith("checkerboard of ") and len(words) > 1:
        cuts = [(" and ".join(words[:i]), " and ".join(words[i:])) for i in range(1, len(words))]
        first, second = max(cuts, key=lambda cut: sum(name in names for name in cut))
        return Parts(first, second, "checkerboard", style, background)
    return Parts(subject, "", "one", style, background)


def rearrange(parts: Parts) -> list[Parts]:
    """The same objects, swapped or in another arrangement."""
    if parts.second:
        swapped = parts._replace(first=parts.second, second=parts.first)
        return [swapped, *(parts._replace(kind=kind) for kind in PAIRS if kind != parts.kind)]
    return [parts._replace(kind=kind) for kind in ("one", "mirrored") if parts.kind and kind != parts.kind]


def list_distractors(parts: Parts, names: Sequence[str]) -> dict[str, list[Parts]]:
    """63 wrong captions by aspect, the same ones whenever the caption is the same.

    Raises ValueError when there are too few names of other objects to draw from.
    """
    wrong = {
        "style": [parts._replace(style=s) for s in ICON_SETS if parts.style and s != parts.style],
        "background": [parts._replace(background=b) for b in BACKGROUNDS if parts.background and b != parts.background],
        "arrangement": rearrange(parts),
    }
    count = CANDIDATES - 1 - sum(map(len, wrong.values()))
    others = [n for n in names if n not in parts[:2]]
    if len(others) < 2 * count:
        raise ValueError(f"found {len(others)} names of other objects, expected at least {2 * count}")
    others = random.Random("/".join(parts)).sample(others, 2 * count)
    # with two objects, two thirds of the wrong captions keep one of them: half-right pictures must not pass
    keep = [(i % 3 == 1, i % 3 == 2) if parts.second else (False, False) for i in range(count)]
    wrong["objects"] = [
        parts._replace(
            first=parts.first if first else others[2 * i],
            second=parts.second if second or not parts.second else others[2 * i + 1],
        )
        for i, (first, second) in enumerate(keep)
    ]
    return wrong
