"""What each band is asked to do with held-out pictures: draw them after their own prompts, and after changed ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..metrics.captions import ASPECTS, Parts, parse_caption
from ..mini.scenes import BACKGROUNDS

KINDS = {"one": "{0}", "left": "{0} left of {1}", "above": "{0} above {1}", "mirrored": "two mirrored {0}"}
KINDS["checkerboard"] = "checkerboard of {0} and {1}"
# the aspects of a prompt that a band's task changes; the others are to stay the source's
CHANGED = {
    "mini": ("objects", "arrangement"),
    "low": ("objects",),
    "mid": ("background",),
    "high": ("style",),
}


@dataclass(frozen=True)
class Task:
    """Prompts to draw with, one a source, and the captions that the pictures should then fit."""

    name: str
    prompts: list[str]
    captions: list[str]
    changed: tuple[str, ...] = ()

    def take(self, count: int) -> "Task":
        """The first of it."""
        return replace(self, prompts=self.prompts[:count], captions=self.captions[:count])

    def split_aspects(self) -> tuple[list[int], list[int]]:
        """Numbers of the aspects that were changed, and of those that were not."""
        asked = [number for number, aspect in enumerate(ASPECTS) if aspect in self.changed]
        return asked, [number for number in range(len(ASPECTS)) if number not in asked]


def keep_prompts(prompts: Sequence[str]) -> Task:
    """Each picture's own prompt."""
    return Task("own prompt", list(prompts), list(prompts))


def change_prompts(band: str, prompts: Sequence[str]) -> Task:
    """Prompts of emoji scenes with what the band's task changes; raises ValueError for prompts of another kind.

    A mini band's prompt says nothing about the background, which is for the source to give.
    """
    scenes = [parse_caption(prompt) for prompt in prompts]
    if unknown := [prompt for prompt, parts in zip(prompts, scenes, strict=True) if not parts.kind]:
        raise ValueError(
            f"{unknown[0]!r} is no caption of an emoji scene (`NAME, STYLE style, COLOUR background`), so that no "
            f"changed prompt can be made from it; give a file with one prompt a line: --changed {band}=FILE"
        )
    changed = [change_parts(band, parts, scenes) for parts in scenes]
    captions = [write_parts(parts) for parts in changed]
    if band == "mini":
        asked = [write_parts(parts).rpartition(", ")[0] for parts in changed]
        return Task("changed prompt", asked, captions, CHANGED[band])
    return Task("changed prompt", captions, captions, CHANGED[band])


def read_prompts(band: str, lines: Sequence[str], count: int) -> Task:
    """Prompts from a file, one a source; raises ValueError for another number of them."""
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < count:
        raise ValueError(f"--changed {band}: found {len(prompts)} prompts, expected one for each of {count} pictures")
    return Task("changed prompt", prompts[:count], prompts[:count], CHANGED[band])


def change_parts(band: str, parts: Parts, scenes: Sequence[Parts]) -> Parts:
    """A scene with what a band leaves free drawn from the other scenes, the same whenever the scene is the same."""
    rng = random.Random(f"{band}/{'/'.join(parts)}")
    if band == "high":
        return parts._replace(style=rng.choice(sorted({scene.style for scene in scenes} - {parts.style})))
    if band == "mid":
        return parts._replace(background=rng.choice(sorted(set(BACKGROUNDS) - {parts.background})))
    others = sorted({name for scene in scenes for name in scene[:2] if name} - set(parts[:2]))
    first, second = rng.sample(others, 2)
    if band == "low":
        return parts._replace(first=first, second=second if parts.second else "")
    return parts._replace(first=first, second="", kind="one")


def write_parts(parts: Parts) -> str:
    """A scene's caption, as `parse_caption` reads it."""
    subject = KINDS[parts.kind].format(parts.first, parts.second)
    return f"{subject}, {parts.style} style, {parts.background} background"
