"""A bar chart of seconds a step by size, drawn with what ComfyUI has anyway."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 540
LEFT, TOP, BOTTOM = 70, 70, 60
BARS = {"original": "#8a8f98", "student": "#e8891c"}
INK, FAINT, PAPER = "#20242b", "#d8dbe0", "#ffffff"


def draw_bars(sizes: list[dict[str, Any]], title: str) -> Image.Image:
    """Two bars for each size, seconds a step on top of them and the speed-up of the student; sizes as in the report."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(picture)
    highest = max((measure_top(size) for size in sizes), default=0.0) or 1.0
    scale = (HEIGHT - TOP - BOTTOM) / (highest * 1.15)
    draw_frame(pen, title, highest, scale)
    room = (WIDTH - LEFT - 20) / max(len(sizes), 1)
    for number, size in enumerate(sizes):
        draw_size(pen, size, LEFT + room * number, room, scale)
    return picture


def measure_top(size: dict[str, Any]) -> float:
    """The longest step of a size in seconds."""
    return max((size[name]["seconds_per_step"] for name in BARS if name in size), default=0.0)


def draw_frame(pen: ImageDraw.ImageDraw, title: str, highest: float, scale: float) -> None:
    """Title, legend and four lines with their seconds."""
    pen.text((LEFT, 12), title, INK, ImageFont.load_default(20))
    font = ImageFont.load_default(15)
    for number, (name, colour) in enumerate(BARS.items()):
        left = LEFT + 120 * number
        pen.rectangle((left, 44, left + 14, 58), colour)
        pen.text((left + 20, 42), name, INK, font)
    pen.text((LEFT + 260, 42), "seconds per step, lower is better", INK, font)
    for part in range(5):
        seconds = highest * part / 4
        y = HEIGHT - BOTTOM - seconds * scale
        pen.line((LEFT, y, WIDTH - 20, y), FAINT)
        pen.text((LEFT - 8, y), f"{seconds:.3g}", INK, font, anchor="rm")


def draw_size(pen: ImageDraw.ImageDraw, size: dict[str, Any], left: float, room: float, scale: float) -> None:
    """One size's bars between `left` and `left + room`, or why there are none."""
    floor, middle, small = HEIGHT - BOTTOM, left + room / 2, ImageFont.load_default(15)
    pen.text((middle, floor + 8), f"{size['width']}x{size['height']}", INK, small, anchor="ma")
    if "error" in size:
        pen.text((middle, floor - 12), size["error"], INK, small, anchor="ms")
        return
    bar = min(room * 0.3, 90)
    for number, (name, colour) in enumerate(BARS.items()):
        seconds = size[name]["seconds_per_step"]
        start, top = middle + bar * (number - 1), floor - seconds * scale
        pen.rectangle((start + 2, top, start + bar - 2, floor), colour)
        pen.text((start + bar / 2, top - 4), f"{seconds:.3g}", INK, small, anchor="ms")
    pen.text((middle, floor + 28), f"{size['speedup']:.2f}x", INK, ImageFont.load_default(20), anchor="ma")
