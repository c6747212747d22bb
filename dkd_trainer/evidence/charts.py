"""The evaluation's plots as PNG: time against error, error by timestep, and rows of pictures."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 1640, 940
LEFT, RIGHT, TOP, BOTTOM = 130, 470, 70, 100
COLOURS = (
    *("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#475569", "#65a30d", "#111827"),
    *("#f59e0b", "#6366f1", "#dc2626", "#2dd4bf"),
)


class Point(NamedTuple):
    """One subject in a plot; points of a family are joined by a line."""

    family: str
    label: str
    x: float
    y: float


class Scale(NamedTuple):
    """One axis, linear or logarithmic: values `low` to `high` lie between pixels `start` and `end`."""

    low: float
    high: float
    start: int
    end: int
    log: bool

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def list_ticks(self) -> list[float]:
        """Round values within the axis, five or so."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
            step *= next(m for m in (5, 2, 1) if (self.high - self.low) / (m * step) >= 3 or m == 1)
            ticks = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def fit_scale(values: Sequence[float], start: int, end: int, log: bool) -> Scale:
    """An axis that holds all values with some air."""
    low, high = min(values), max(values)
    if log:
        return Scale(low / 1.25, high * 1.25, start, end, True)
    air = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - air, high + air, start, end, False)


def draw_points(
    points: Sequence[Point], title: str, x_name: str, y_name: str, mark: float | None = None, log_y: bool = True
) -> bytes:
    """A PNG of families of points with a legend; `mark` is an x value with a dashed line, the teacher's."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    xs = [point.x for point in points] + ([] if mark is None else [mark])
    across = fit_scale(xs, LEFT, WIDTH - RIGHT, False)
    down = fit_scale([point.y for point in points], HEIGHT - BOTTOM, TOP, log_y)
    draw_axes(pen, font, across, down, title, x_name, y_name)
    if mark is not None:
        draw_dashes(pen, across.place(mark), "#9ca3af")
        pen.text((across.place(mark), TOP - 4), "teacher", "#6b7280", font, "md")
    for number, family in enumerate(dict.fromkeys(point.family for point in points)):
        members = sorted((p for p in points if p.family == family), key=lambda p: p.x)
        colour = COLOURS[number % len(COLOURS)]
        places = [(across.place(p.x), down.place(p.y)) for p in members]
        pen.line(places, colour, 3, joint="curve")
        for (x, y), point in zip(places, members, strict=True):
            pen.ellipse((x - 8, y - 8, x + 8, y + 8), colour)
            pen.text((x + 12, y - 4), point.label, colour, font, "lb")
        row = TOP + 20 + 34 * number
        pen.ellipse((WIDTH - RIGHT + 24, row - 8, WIDTH - RIGHT + 40, row + 8), colour)
        pen.text((WIDTH - RIGHT + 50, row), family, "black", font, "lm")
    return to_png(picture)


def draw_axes(pen, font, across: Scale, down: Scale, title: str, x_name: str, y_name: str) -> None:
    """Frame, ticks with their values, names of both axes and the title."""
    pen.rectangle((across.start, down.end, across.end, down.start), outline="#9ca3af")
    for tick in across.list_ticks():
        pen.line([(across.place(tick), down.start), (across.place(tick), down.start + 8)], "#9ca3af", 2)
        pen.text((across.place(tick), down.start + 14), f"{tick:.4g}", "black", font, "mt")
    for tick in down.list_ticks():
        pen.line([(across.start, down.place(tick)), (across.end, down.place(tick))], "#e5e7eb")
        pen.text((across.start - 10, down.place(tick)), f"{tick:.4g}", "black", font, "rm")
    pen.text(((across.start + across.end) / 2, HEIGHT - 34), x_name, "black", font, "mm")
    pen.text((20, 20), f"{title}; vertical: {y_name}", "black", font, "lt")


def draw_dashes(pen, x: float, colour: str) -> None:
    for y in range(TOP, HEIGHT - BOTTOM, 16):
        pen.line([(x, y), (x, min(y + 8, HEIGHT - BOTTOM))], colour, 2)


def draw_sheet(rows: Sequence[tuple[str, Tensor]], scale: int = 1) -> bytes:
    """A PNG of 256 colours of `compose_sheet`."""
    return to_png(compose_sheet(rows, scale).quantize(256))


def compose_sheet(rows: Sequence[tuple[str, Tensor]], scale: int = 1) -> Image.Image:
    """A picture with a named row of pictures (n, 3, H, W), uint8, per subject."""
    strips = [torch.cat(list(pictures), dim=2).permute(1, 2, 0).numpy() for _, pictures in rows]
    name_width, height = 300, rows[0][1].shape[-2] * scale
    width = name_width + max(strip.shape[1] for strip in strips) * scale
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, ((name, _), strip) in enumerate(zip(rows, strips, strict=True)):
        picture = Image.fromarray(strip)
        sheet.paste(picture.resize((picture.width * scale, height)), (name_width, number * height))
        pen.multiline_text((8, number * height + height // 2), break_name(name), "black", font, "lm")
    return sheet


def break_name(name: str, width: int = 34) -> str:
    """A name over several lines."""
    lines = [""]
    for word in name.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
