"""Speed-ups as bars, one group a contest."""

import io
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROW, MARGIN, LABELS, BARS = 24, 12, 240, 520
COLOURS = {"dha": "#c2410c", "student": "#ea7a3c", "ceiling": "#d4d4d4"}
SHOWN = ("step", "picture")


def draw_chart(document: dict[str, Any]) -> bytes:
    """A PNG with one bar a subject, as long as its speed-up; a whisker from the slowest to the fastest round."""
    groups = [(result, [s for s in result["subjects"] if s.get("ratio")]) for result in document["results"]]
    groups = [(result, subjects) for result, subjects in groups if subjects and result["kind"] in SHOWN]
    height = 2 * MARGIN + ROW * sum(1 + len(subjects) for _, subjects in groups)
    picture = Image.new("RGB", (LABELS + BARS + 2 * MARGIN, height), "white")
    pen, font, top = ImageDraw.Draw(picture), ImageFont.load_default(13), MARGIN
    highest = max((subject["ratio"]["max"] for _, subjects in groups for subject in subjects), default=1.0)
    scale = 0.85 * BARS / highest
    for result, subjects in groups:
        pen.text((MARGIN, top + 4), write_title(result, document["settings"]["dtype"]), "black", font)
        top += ROW
        for subject in subjects:
            draw_bar(pen, font, top, subject, scale)
            top += ROW
    pen.line((LABELS + scale, MARGIN, LABELS + scale, height - MARGIN), "#94a3b8", 1)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def write_title(result: dict[str, Any], dtype: str) -> str:
    """What a group of bars shows."""
    what = "a picture" if result["kind"] == "picture" else "a UNet step"
    how = ", compiled" if result.get("compiled") else f", {result['backend']}" if "backend" in result else ""
    return f"{result['width']}x{result['height']}: speed-up of {what}, {dtype}, batch {result['batch']}{how}"


def draw_bar(pen: ImageDraw.ImageDraw, font: Any, top: int, subject: dict[str, Any], scale: float) -> None:
    """One subject's bar below `top`, `scale` pixels long at 1x."""
    ratio, centre = subject["ratio"], top + ROW // 2
    colour = COLOURS.get(subject["name"].split("-")[0], "#64748b")
    pen.text((MARGIN, top + 3), subject["name"], "black", font)
    pen.rectangle((LABELS, top + 3, LABELS + ratio["median"] * scale, top + ROW - 4), colour)
    pen.line((LABELS + ratio["min"] * scale, centre, LABELS + ratio["max"] * scale, centre), "black", 1)
    pen.text((LABELS + ratio["max"] * scale + 6, top + 3), f"{ratio['median']:.2f}x", "black", font)
