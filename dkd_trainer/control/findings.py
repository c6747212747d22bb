"""What was found about controls, as JSON, Markdown and sheets of pictures."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dha.frequency import BANDS, filter_band
from dha.whole_file import write_whole

from ..evidence.charts import compose_sheet
from ..evidence.columns import Column, tabulate
from ..evidence.evaluation import decode_pictures
from ..evidence.report import describe_files
from ..evidence.summary import Row, mean_with_error
from ..host import Teacher
from .tasks import Task

FREE = ", no control"
FORMAT = "dha-control-evaluation"
SHOWN, GAIN = 6, 4  # pictures of a sheet; how many times larger a difference is shown
TASKS = {
    "mini": "style-guided creation",
    "low": "semantic manipulation",
    "mid": "scene translation",
    "high": "style translation",
}
BRANCH = {True: "Students run in the control branch as well.", False: "The control branch runs without DHA."}
DEFINITIONS = """\
Every picture is steered by the latents of a real one that training never saw. Fidelity, by band: cosine between the DCT
coefficients of the drawn latents and of the source's (mini: each diagonal sorted); 1 is the source's band. Structure:
distance to the source by self-similarities of EfficientNet-lite0 features, x 1000 (as Splice, arXiv 2201.00424, has it
on DINO's). Prompt: probability of the prompt's aspects among wrong ones; "asked" are the aspects that the task changes,
"kept" those that prompt and source have in common. PSNR and perceptual distance: a student's pictures against those of
its teacher, with the same control, strength, prompts and seeds. Changes are against the same model without control,
picture by picture. Behind ±: one standard error over pictures."""
COLUMNS = (
    *(Column(band, f"fidelity_{band}", ".3f", True) for band in BANDS),
    Column("own band, change", "band_change", "+.3f"),
    Column("structure", "structure_x1e3", ".1f", True),
    Column("change", "structure_change_x1e3", "+.1f"),
    Column("prompt", "prompt_score", ".3f", True),
    Column("change", "prompt_score_change", "+.3f"),
    Column("asked", "asked", ".3f", True),
    Column("kept", "kept", ".3f", True),
    Column("CLIP", "clip_score", ".2f", True),
    Column("PSNR", "psnr", ".1f", True),
    Column("perceptual", "perceptual", ".3f", True),
)
COSTS = (
    Column("ms a step", "milliseconds", ".4g"),
    Column("relative", "relative", ".3f"),
    Column("peak MB", "peak_mb", ".1f"),
    Column("own weights MB", "weight_mb", ".2f"),
)


@dataclass(frozen=True)
class Drawn:
    """What a band's variants drew for a task after sources (n, 4, h, w), whose pictures are uint8 (n, 3, H, W)."""

    band: str
    task: Task
    pictures: Tensor
    sources: Tensor
    variants: dict[str, dict[str, Tensor]]

    @property
    def size(self) -> str:
        return f"{self.pictures.shape[-1]}x{self.pictures.shape[-2]}"

    def summarise(self) -> dict[str, Row]:
        """Figures with their standard errors by variant; changes are those against the same model without control."""
        rows = {name: summarise(measured) for name, measured in self.variants.items()}
        for name, measured in self.variants.items():
            if not name.endswith(FREE):
                free = self.variants[name.rpartition(", ")[0] + FREE]
                rows[name] |= compare(measured, free, list(BANDS).index(self.band))
        return rows


@dataclass(frozen=True)
class Findings:
    """All there is to say: what ran where (`record`), `settings`, pictures and their figures, step times."""

    record: dict[str, str]
    settings: dict
    drawn: list[Drawn]
    timing: list[dict]
    missing: dict[str, str]


def summarise(measured: dict[str, Tensor]) -> Row:
    """Means over pictures with their standard errors."""
    row: Row = {}
    for number, band in enumerate(BANDS):
        row |= mean_with_error(f"fidelity_{band}", measured["fidelity"][:, number])
    row |= mean_with_error("structure_x1e3", 1e3 * measured["structure"])
    for name in ("prompt_score", "asked", "kept", "clip_score", "psnr", "perceptual"):
        if name in measured:
            row |= mean_with_error(name, measured[name])
    return {name: value for name, value in row.items() if math.isfinite(value)}  # equal pictures have no PSNR


def compare(measured: dict[str, Tensor], free: dict[str, Tensor], band: int) -> Row:
    """What the control changed, picture by picture: fidelity in its own band, structure and prompt score."""
    row = mean_with_error("band_change", measured["fidelity"][:, band] - free["fidelity"][:, band])
    row |= mean_with_error("structure_change_x1e3", 1e3 * (measured["structure"] - free["structure"]))
    if "prompt_score" in measured:
        row |= mean_with_error("prompt_score_change", measured["prompt_score"] - free["prompt_score"])
    return row


def to_document(findings: Findings) -> dict:
    """The JSON document."""
    results = [
        {"band": drawn.band, "task": drawn.task.name, "size": drawn.size, "pictures": len(drawn.pictures)}
        | {"rows": drawn.summarise(), "example": [drawn.task.prompts[0], drawn.task.captions[0]]}
        for drawn in findings.drawn
    ]
    head = {"format": FORMAT, "version": 1, **findings.record, "settings": findings.settings}
    return {**head, "missing": findings.missing, "results": results, "timing": findings.timing}


def list_tables(findings: Findings) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and cells of all tables."""
    for drawn in findings.drawn:
        title = f"{drawn.band.capitalize()} ({TASKS[drawn.band]}), {drawn.task.name}, {drawn.size}"
        yield title, *tabulate(drawn.summarise(), COLUMNS)
    for timing in findings.timing:
        title = (
            f"One UNet step of {timing['checkpoint']} ({timing['architecture']}) at {timing['size']}x{timing['size']}, "
            f"batch {timing['batch']}, {timing['rounds']} rounds in turn"
        )
        rows = {name: describe_cost(found) for name, found in timing["variants"].items()}
        yield title, *tabulate(rows, COSTS)


def describe_cost(found: dict[str, float]) -> Row:
    memory = {"peak_mb": found["peak_bytes"] / 1e6, "weight_mb": found["weight_bytes"] / 1e6}
    return {"milliseconds": 1e3 * found["seconds"], "relative": found["relative"], **memory}


def to_markdown(findings: Findings, sheets: dict[str, tuple[str, bytes]]) -> str:
    """Set-up, tables, pictures and what was left out."""
    s, r = findings.settings, findings.record
    zero = "yes" if all(s["strength_0_is_uncontrolled"].values()) else "NO"
    setting = (
        f"{s['teacher']} ({s['architecture']}), held-out pairs {s['held_out_pairs']}, {s['sampler']}, {s['steps']} "
        f"steps, cfg {s['cfg']:g}, {s['precision']}, on {r['hardware']}; torch {r['torch']}, ComfyUI {r['comfyui']}, "
        f"commit {r['commit']}. {BRANCH[s['accelerate']]} Strength 0 is the uncontrolled model to the bit: {zero}."
    )
    files = [describe_files("Controls", s["controls"]), describe_files("Students", s["students"])]
    setting = " ".join(filter(None, [setting, *files]))
    lines = ["# Frequency control", "", setting, "", f"`{r['command']}`", "", DEFINITIONS]
    for title, head, cells in list_tables(findings):
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    lines += ["", *(f"![{caption}]({name})\n" for name, (caption, _) in sheets.items())]
    if findings.missing:
        lines += ["Left out: " + "; ".join(f"{name} ({why})" for name, why in findings.missing.items()) + "."]
    return "\n".join(lines) + "\n"


def list_rows(drawn: Drawn, teacher: Teacher, picks: slice) -> list[tuple[str, Tensor]]:
    """Source, its band, unsteered and steered teacher, steered student, and the difference of the last two."""
    names, sources = list(drawn.variants), drawn.sources[picks]
    taught = [name for name in names if name.startswith("teacher")]
    others = [name for name in names if name not in taught]
    rows = [("source", drawn.pictures[picks])]
    rows.append((f"its {drawn.band} band", decode_pictures(teacher, filter_band(sources, drawn.band))))
    shown = [taught[0], taught[-1], *others[-1:]]
    rows += [(name, drawn.variants[name]["pictures"][picks]) for name in shown]
    if others:
        first, last = rows[-2][1], rows[-1][1]
        difference = (first.int() - last.int()).abs().mul(GAIN).clamp(max=255).to(torch.uint8)
        rows.append((f"{GAIN} x difference of the last two", difference))
    return rows


def draw_sheets(findings: Findings, teacher: Teacher) -> dict[str, tuple[str, bytes]]:
    """Caption and JPEG by file name: a sheet of every band's changed prompts at every size."""
    sheets = {}
    for drawn in findings.drawn:
        if drawn.task.changed:
            caption = f"{TASKS[drawn.band].capitalize()} at {drawn.size}: " + "; ".join(drawn.task.prompts[:SHOWN])
            rows = list_rows(drawn, teacher, slice(SHOWN))
            sheets[f"control-{drawn.band}-{drawn.size}.jpg"] = (caption, to_jpeg(compose_sheet(rows)))
    return sheets


def draw_overview(findings: Findings, teacher: Teacher, picks: list[int]) -> bytes:
    """A JPEG with a row for each band: for every pick what `list_rows` lists, side by side, at the first size."""
    rows = []
    for drawn in findings.drawn:
        if drawn.task.changed and drawn.size == findings.drawn[0].size:
            columns = [list_rows(drawn, teacher, slice(pick, pick + 1)) for pick in picks]
            rows.append((TASKS[drawn.band], torch.cat([picture for column in columns for _, picture in column])))
    return to_jpeg(compose_sheet(rows))


def describe_picks(picks: list[int]) -> str:
    """The caption of `draw_overview`."""
    numbers = ", ".join(map(str, picks))
    return f"A row for each band, of the pictures measured those with the numbers {numbers} (from 0), picked by --picks"


def to_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=78, optimize=True)
    return buffer.getvalue()


def write_findings(findings: Findings, teacher: Teacher, out: Path, picks: list[int]) -> list[Path]:
    """Write control.json, control.md, the sheets and control.jpg into a folder; the files that were written."""
    overview = draw_overview(findings, teacher, picks)
    sheets = {"control.jpg": (describe_picks(picks), overview), **draw_sheets(findings, teacher)}
    files = {name: content for name, (_, content) in sheets.items()}
    files["control.json"] = (json.dumps(to_document(findings), indent=1, allow_nan=False) + "\n").encode()
    files["control.md"] = to_markdown(findings, sheets).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(out / name, content)
    return [out / name for name in files]
