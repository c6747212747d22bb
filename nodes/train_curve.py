"""Pictures of a training: its losses over the steps, and its newest samples below them."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .train_journal import Progress

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 80, 40
INK, FAINT, PAPER = "#20242b", "#d8dbe0", "#ffffff"
COLOURS = ("#e8891c", "#3b7dd8", "#3f9d5a", "#a45ad1", "#c0485a", "#8a8f98")
SMOOTH = 0.9  # how much of the mean so far stays in the thick line
HELD_OUT = "held-out error"


class Scale:
    """Where a step and a loss (on a logarithmic scale) lie in the picture."""

    def __init__(self, steps: int, values: Sequence[float]):
        self.steps = max(steps, 1)
        usable = [math.log10(value) for value in values if value > 0] or [-1.0, 0.0]
        self.low, self.high = math.floor(min(usable) * 4) / 4, math.ceil(max(usable) * 4 + 0.01) / 4

    def place(self, step: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps
        share = (math.log10(max(value, 10**self.low)) - self.low) / (self.high - self.low)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def draw_curve(progress: Progress, title: str) -> Image.Image:
    """A line for each loss of each stage, a dot for each validation."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(picture)
    lines = [smooth(points) for points in progress.losses.values()]
    # Not single losses: what two grids have in common may be next to nothing in one step.
    scale = Scale(progress.total, [value for points in [*lines, progress.errors] for _, value in points])
    draw_axes(pen, scale, progress, title)
    for number, points in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        line = [scale.place(step, value) for step, value in points]
        if len(line) > 1:
            pen.line(line, colour, 3, joint="curve")
        elif line:
            draw_dot(pen, line[0], colour)
    for step, value in progress.errors:
        draw_dot(pen, scale.place(step, value), INK)
    return picture


def draw_axes(pen: ImageDraw.ImageDraw, scale: Scale, progress: Progress, title: str) -> None:
    """Title, legend, lines with their values, and where each stage begins."""
    font = ImageFont.load_default(15)
    pen.text((LEFT, 12), title, INK, ImageFont.load_default(20))
    names = [*progress.losses, *([HELD_OUT] if progress.errors else [])]
    x = float(LEFT)
    for number, name in enumerate(names):
        colour = INK if name == HELD_OUT else COLOURS[number % len(COLOURS)]
        pen.rectangle((x, 48, x + 14, 62), colour)
        pen.text((x + 20, 46), name, INK, font)
        x += 45 + pen.textlength(name, font)
    for part in range(5):
        value = 10 ** (scale.low + (scale.high - scale.low) * part / 4)
        y = scale.place(0, value)[1]
        pen.line((LEFT, y, WIDTH - RIGHT, y), FAINT)
        pen.text((LEFT - 8, y), f"{value:.2g}", INK, font, anchor="rm")
    for first, name in progress.starts:
        x = scale.place(first, 1.0)[0]
        pen.line((x, TOP, x, HEIGHT - BOTTOM), FAINT)
        pen.text((x + 4, HEIGHT - BOTTOM + 6), name, INK, font)
    pen.text((WIDTH - RIGHT, HEIGHT - BOTTOM + 6), f"{progress.total} steps", INK, font, anchor="ra")


def draw_dot(pen: ImageDraw.ImageDraw, place: tuple[float, float], colour: str) -> None:
    x, y = place
    pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The running mean, which starts at the first value."""
    found: list[tuple[int, float]] = []
    mean = points[0][1] if points else 0.0
    for number, (step, value) in enumerate(points):
        keep = min(SMOOTH, number / (number + 1))
        mean = keep * mean + (1 - keep) * value
        found.append((step, mean))
    return found


def open_sheet(progress: Progress) -> Image.Image:
    """The newest samples: rows of teacher, student and their difference; or a sentence where there are none."""
    if progress.sheet and progress.sheet.is_file():
        with Image.open(progress.sheet) as picture:
            return picture.convert("RGB")
    picture = Image.new("RGB", (512, 64), PAPER)
    text = "no samples: they need at least 8 pictures or prompts"
    ImageDraw.Draw(picture).text((256, 32), text, INK, ImageFont.load_default(15), anchor="mm")
    return picture


def join(curve: Image.Image, sheet: Image.Image) -> Image.Image:
    """The curve above the samples, as wide as the curve."""
    height = round(sheet.height * curve.width / sheet.width)
    joined = Image.new("RGB", (curve.width, curve.height + height), PAPER)
    joined.paste(curve, (0, 0))
    joined.paste(sheet.resize((curve.width, height), Image.Resampling.LANCZOS), (0, curve.height))
    return joined
