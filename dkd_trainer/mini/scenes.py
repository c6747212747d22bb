"""Composed scenes with captions: mirrored and checkerboard ones need distant places of a picture to agree."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from .emoji import Concept

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "sky blue": (150, 205, 245),
    "pink": (250, 190, 210),
    "yellow": (250, 225, 120),
    "green": (150, 205, 140),
    "purple": (185, 160, 225),
    "gray": (190, 190, 190),
}
KINDS = {"one": 0.64, "left": 0.12, "above": 0.08, "mirrored": 0.08, "checkerboard": 0.08}


@dataclass(frozen=True)
class Scene:
    """A recipe: enough to draw the picture and to write its caption again."""

    kind: str
    first: int
    second: int
    style: str
    background: str

    def to_json(self) -> dict:
        return asdict(self)


def draw_recipe(rng: random.Random, by_style: dict[str, list[int]], kind: str | None = None) -> Scene:
    """Sample one scene over picture indices grouped by style."""
    style = rng.choices(list(by_style), [len(v) for v in by_style.values()])[0]
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    first, second = rng.sample(by_style[style], 2)
    return Scene(kind, first, second, style, rng.choice(list(BACKGROUNDS)))


def draw_picture(scene: Scene, pictures: np.ndarray, size: int) -> np.ndarray:
    """The scene as RGB uint8 (size, size, 3)."""
    canvas = Image.new("RGBA", (size, size), (*BACKGROUNDS[scene.background], 255))

    def paste(index: int, side: float, x: float, y: float, mirror: bool = False) -> None:
        picture = Image.fromarray(pictures[index]).resize((round(size * side),) * 2, Image.LANCZOS)
        if mirror:
            picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
        canvas.alpha_composite(picture, (round(size * x), round(size * y)))

    if scene.kind == "one":
        paste(scene.first, 0.92, 0.04, 0.04)
    elif scene.kind == "left":
        paste(scene.first, 0.46, 0.02, 0.27)
        paste(scene.second, 0.46, 0.52, 0.27)
    elif scene.kind == "above":
        paste(scene.first, 0.46, 0.27, 0.02)
        paste(scene.second, 0.46, 0.27, 0.52)
    elif scene.kind == "mirrored":
        paste(scene.first, 0.46, 0.02, 0.27)
        paste(scene.first, 0.46, 0.52, 0.27, mirror=True)
    else:
        for i in range(9):
            paste((scene.first, scene.second)[i % 2], 0.31, 0.02 + 0.325 * (i % 3), 0.02 + 0.325 * (i // 3))
    return np.asarray(canvas.convert("RGB"))


def write_caption(scene: Scene, concepts: Sequence[Concept], rng: random.Random | None = None) -> str:
    """`red apple left of rocket, noto style, pink background`; with an rng, search words stand in for some names."""

    def name(index: int) -> str:
        concept = concepts[index]
        if rng and concept.tags and rng.random() < 0.15:
            return " ".join(rng.sample(concept.tags, min(3, len(concept.tags))))
        return concept.label

    first = name(scene.first)
    subject = {
        "one": first,
        "left": f"{first} left of {name(scene.second)}",
        "above": f"{first} above {name(scene.second)}",
        "mirrored": f"two mirrored {first}",
        "checkerboard": f"checkerboard of {first} and {name(scene.second)}",
    }[scene.kind]
    return f"{subject}, {scene.style} style, {scene.background} background"
