"""The folder that the demo leaves: pictures, contact sheet, tables as Markdown and JSON, one HTML page."""

import base64
import io
import json
import os
import tempfile
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from .results import (
    MINI_SPEED_NOTE,
    QUALITY_NOTE,
    SPEED_NOTE,
    Results,
    describe_settings,
    show_psnr,
    tabulate_quality,
    tabulate_speed,
)

RESULTS = "results.json"
SCALE, BAR = 2, 28


def check_out(out: Path) -> None:
    """Raises FileExistsError where writing the report would replace something that is not one."""
    if out.exists() and not (out / RESULTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is no earlier report of this demo (it has no {RESULTS}); "
            "choose another folder with --out or move it away."
        )


def draw_contact_sheet(results: Results) -> Image.Image:
    """One row a prompt: original, student, difference, twice as large, with the prompt above."""
    pictures = [Image.open(io.BytesIO(item.comparison)).convert("RGB") for item in results.comparisons]
    pictures = [
        picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.LANCZOS)
        for picture in pictures
    ]
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, BAR + sum(picture.height + BAR for picture in pictures)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(("original", "DHA student", "difference, amplified")):
        pen.text((width * column // 3 + 6, 6), title, "black", font)
    top = BAR
    for item, picture in zip(results.comparisons, pictures, strict=True):
        psnr = show_psnr(item.report)
        pen.text((6, top + 6), f"{item.prompt}  [{psnr if psnr == 'identical' else f'PSNR {psnr} dB'}]", "black", font)
        sheet.paste(picture, (0, top + BAR))
        top += picture.height + BAR
    return sheet


def write_markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_markdown(results: Results) -> str:
    """Both tables with their notes, machine and command."""
    parts = ["# DHA demo", "## The same prompt and seed", QUALITY_NOTE, MINI_SPEED_NOTE, describe_settings(results)]
    parts += [write_markdown_table(*tabulate_quality(results)), "![contact sheet](contact-sheet.png)"]
    parts += ["## Speed at full size", SPEED_NOTE]
    parts.append(write_markdown_table(*tabulate_speed(results.speed)) if results.speed else results.speed_problem)
    machine = results.summarise()["machine"]
    parts += ["## Machine", write_markdown_table(["what", "value"], [[key, str(machine[key])] for key in machine])]
    return "\n\n".join(parts) + "\n"


def write_html(results: Results) -> str:
    """One page with everything in it, pictures included."""
    folder = Path(__file__).resolve().parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        notes={"quality": QUALITY_NOTE, "mini": MINI_SPEED_NOTE, "speed": SPEED_NOTE},
        settings=describe_settings(results),
        pictures=[
            {"prompt": item.prompt, "psnr": show_psnr(item.report), "data": base64.b64encode(item.comparison).decode()}
            for item in results.comparisons
        ],
        quality=tabulate_quality(results),
        speed=tabulate_speed(results.speed) if results.speed else None,
        speedup=results.speed["speedup"] if results.speed else None,
        problem=results.speed_problem,
        machine=results.summarise()["machine"],
    )


def fill_folder(folder: Path, results: Results) -> None:
    (folder / "pictures").mkdir()
    for number, item in enumerate(results.comparisons, start=1):
        for name in ("original", "student", "comparison"):
            (folder / "pictures" / f"{number:02}-{name}.png").write_bytes(getattr(item, name))
    draw_contact_sheet(results).save(folder / "contact-sheet.png")
    (folder / "results.md").write_text(write_markdown(results), encoding="utf-8")
    (folder / "report.html").write_text(write_html(results), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(results.summarise(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_report(out: Path, results: Results) -> None:
    """Write the whole folder aside and put it in place in one go; an earlier report there is replaced.

    Raises FileExistsError as `check_out` does.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        fill_folder(new, results)
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
