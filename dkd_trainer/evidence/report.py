"""An evaluation as JSON, as Markdown, as one HTML file that holds its pictures, and as plots."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dha.whole_file import write_whole

from ..diffusion import TIME_BANDS
from .charts import Point, draw_points, draw_sheet
from .columns import ERROR, FREQUENCIES, PERCEPTUAL, QUALITY, TIMESTEPS, Column, tabulate, write_figure
from .summary import Row, judge_null_band

FORMAT = "dha-evaluation"
EQUAL = 1.02  # steps whose times differ by less are called equally long
NULL_BAND = (
    "Within the null band: no farther from the teacher than it is itself in half precision or with a fifth fewer steps "
    "(a change passes too where two standard errors reach that)"
)
DEFINITIONS = """\
Error: |e_s - e_t| / |e_t| of the prediction for the same noisy latents, by timestep; lasting: the part of it that two
draws of what changes from step to step have in common (where DHA's grids stand, which tokens ToMe merges), the rest
mostly cancels over a sampling. All else is of pictures drawn with the same prompts and seeds: relative error of the
final latents, and of their DCT coefficients in the bands low (i + j up to 30 of a 64x64 latent), mid (20 to 40) and
high (50 and above); median PSNR, mean SSIM and perceptual distance (EfficientNet-lite0) to the teacher's; KID x 1e3 on
the same network's features against the real pictures of the prompts; score of the prompt. Behind ±: one standard error
over pictures (KID: delete-a-group jackknife); "change" is against the teacher, prompt by prompt."""


@dataclass
class Report:
    """All there is to say: what ran where (`record`), `settings`, figures by subject, step times, and pictures.

    `families` are family and label of each subject in the plots, `ours` the forms of DHA among them, `shown` those
    whose difference may be shown; `missing` names metrics that could not be computed.
    """

    record: dict[str, str]
    settings: dict
    rows: dict[str, Row]
    families: dict[str, tuple[str, str]]
    ours: set[str]
    timing: list[dict]
    missing: dict[str, str]
    sheet: list[tuple[str, Tensor]]
    shown: Sequence[str] = ()


def to_document(report: Report) -> dict:
    """The JSON document."""
    null = [name for name, (family, _) in report.families.items() if family == "null"]
    others = [name for name in report.families if name not in null]
    return {
        "format": FORMAT,
        "version": 1,
        **report.record,
        "settings": report.settings,
        "missing": report.missing,
        "rows": report.rows,
        "within_null_band": judge_null_band(report.rows, null, others),
        "timing": report.timing,
        "at_equal_time": [compare_at_equal_time(report, timing["subjects"]) for timing in report.timing],
    }


def choose_figure(rows: dict[str, Row], names: Iterable[str]) -> tuple[Column, dict[str, float]]:
    """By what subjects are compared, and their values: the pictures' distance, without it the prediction's error.

    By error what stops before the end is left out: where it is exact it would win whole bands of timesteps for less
    than that many steps, and fewer steps have none. What has neither is the teacher.
    """
    found = {name: rows[name] for name in names if rows[name].keys() & {"error mean", "perceptual"}}
    if all("perceptual" in row for row in found.values()):
        return PERCEPTUAL, {name: row["perceptual"] for name, row in found.items()}
    return ERROR, {name: row["error mean"] for name, row in found.items() if errs_throughout(row)}


def errs_throughout(row: Row) -> bool:
    """Whether there is an error in every band of timesteps: none in the last ones is what stops before the end."""
    return all(row.get(f"error {low}-{high}") for low, high in TIME_BANDS)


def compare_at_equal_time(report: Report, times: dict[str, dict]) -> dict[str, dict]:
    """For every form of DHA, the `best` of the peers that take at least as long a step; empty without any peers.

    `best_faster` is the best of those that are still faster than the teacher, which is exact at its own time. Times are
    relative to the teacher's in the same round, which a machine's moods disturb least.
    """
    _, errors = choose_figure(report.rows, times)
    peers = sorted(set(errors) - report.ours)
    found = {}
    for name in (name for name in errors if name in report.ours and peers):
        slower = [peer for peer in peers if times[peer]["relative"] * EQUAL >= times[name]["relative"]]
        faster = [peer for peer in slower if times[peer]["relative"] * EQUAL < 1]
        entry: dict = {"peers": len(slower)}
        for key, members in (("best", slower), ("best_faster", faster)):
            best = min(members, key=lambda peer: errors[peer], default=None)
            entry |= {key: best, f"better_than_{key}": best is None or errors[name] < errors[best]}
        found[name] = entry
    return found


def list_tables(report: Report, document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and cells of all tables."""
    tables = [
        ("Quality", *tabulate(report.rows, QUALITY)),
        ("Error of the prediction by timestep", *tabulate(report.rows, TIMESTEPS)),
        ("Error of the final latents by frequency", *tabulate(report.rows, FREQUENCIES)),
    ]
    verdicts = document["within_null_band"]
    if verdicts:
        figures = list(dict.fromkeys(figure for verdict in verdicts.values() for figure in verdict))
        cells = [
            [name, *({True: "yes", False: "no"}.get(verdict.get(f), "-") for f in figures)]  # type: ignore[arg-type]
            for name, verdict in verdicts.items()
        ]
        head = ["", *(figure.replace("_", " ").replace(" x1e3", "") for figure in figures)]
        tables.append((NULL_BAND, head, cells))
    for timing, equal in zip(report.timing, document["at_equal_time"], strict=True):
        tables.append(tabulate_time(report, timing, equal))
    return tables


def tabulate_time(report: Report, timing: dict, equal: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """Step times in the order of the error, and the best peer at the same or more time."""
    title = (
        f"One UNet step of {timing['checkpoint']} ({timing['architecture']}) at {timing['size']}x{timing['size']}, "
        f"batch {timing['batch']}, {timing['rounds']} rounds in turn; the mean over a sampling where DHA stops before "
        "its end, and for fewer steps their time over as many steps as the others take"
    )
    by, _ = choose_figure(report.rows, timing["subjects"])
    best = f"best peer at this time or more, by {'error' if by is ERROR else 'perceptual distance'}"
    head = ["", "ms a step", "quartiles", "relative", "attention pairs", "error", "perceptual", best]
    cells = []
    for name, t in sorted(timing["subjects"].items(), key=lambda item: item[1]["relative"]):
        quartiles = f"{1e3 * t['q1']:.4g} to {1e3 * t['q3']:.4g}"
        figures = [f"{1e3 * t['seconds']:.4g}", quartiles, f"{t['relative']:.3f}", f"{t['attention_pairs']:.1%}"]
        figures += [write_figure(report.rows[name], column) for column in (ERROR, PERCEPTUAL)]
        cells.append([name, *figures, say_equal(equal.get(name))])
    if not equal:
        return title, head[:-1], [row[:-1] for row in cells]
    return title, head, cells


def say_equal(against: dict | None) -> str:
    """The last cell of a row of times: the best peers at this time or more, and whether they are nearer."""
    if against is None:
        return ""
    said = [
        f"{against[key]} is {'farther' if against[f'better_than_{key}'] else 'nearer'}{where}"
        for key, where in (("best", ""), ("best_faster", ", of those faster than the teacher"))
        if against[key] is not None
    ]
    return "; ".join(dict.fromkeys(said[:1] if against["best"] == against["best_faster"] else said)) or "none as slow"


def draw_plots(report: Report, stem: str) -> dict[str, tuple[str, bytes]]:
    """Caption and PNG by file name: rows of pictures, time against error, error by timestep."""
    plots = {
        f"{stem}.png": ("The same prompts and seeds in every column", draw_sheet(report.sheet)),
        f"{stem}-short.png": (name_short(report), draw_sheet(shorten(report))),
    }
    for timing in report.timing:
        by, values = choose_figure(report.rows, timing["subjects"])
        points = [Point(*report.families[n], timing["subjects"][n]["relative"], value) for n, value in values.items()]
        if points:
            size = f"{timing['size']}x{timing['size']}"
            what = "Error of the prediction" if by is ERROR else "Perceptual distance to the teacher"
            title = f"{what} against the mean time of a UNet step at {size} ({timing['architecture']})"
            png = draw_points(points, title, "time of a step, the teacher's is 1", what.lower(), mark=1.0)
            plots[f"{stem}-pareto-{timing['size']}.png"] = (title, png)
    lines = [
        Point(name, "", (low + high) / 2, report.rows[name][f"error {low}-{high}"])
        for name in choose_lines(report)
        for low, high in TIME_BANDS
    ]
    if lines:
        title = "Error by timestep"
        plots[f"{stem}-timesteps.png"] = (title, draw_points(lines, title, "timestep", "error of the prediction"))
    return plots


def choose_shown(report: Report) -> str:
    """The form of DHA whose difference is shown: the last that is to be shown, else the last of all."""
    names = [name for name, _ in report.sheet]
    shown = [name for name in names if name in report.shown]
    return [*names[:1], *(name for name in names[1:] if name in report.ours), *shown][-1]


def name_short(report: Report) -> str:
    """The short sheet's caption."""
    return f"Teacher, DHA, and four times the difference of {choose_shown(report)} to the teacher"


def shorten(report: Report) -> list[tuple[str, Tensor]]:
    """Of the sheet the teacher, the presets or else all forms of DHA, and how far one of them is from the teacher."""
    presets = [name for name in report.ours if ", preset " in name]
    rows = [row for number, row in enumerate(report.sheet) if number == 0 or row[0] in (presets or report.ours)]
    name, (_, teacher) = choose_shown(report), rows[0]
    difference = (dict(report.sheet)[name].int() - teacher.int()).abs().mul(4).clamp(max=255).to(teacher.dtype)
    return [*rows, (f"4 x difference, {name}", difference)]


def choose_lines(report: Report) -> list[str]:
    """All forms of DHA and the first member of every other family: more lines than that cannot be told apart.

    What stops before the end is left out: the same line as without, and none where it has no error.
    """
    first = {family: name for name, (family, _) in reversed(report.families.items())}
    named = [name for name in report.families if name in report.ours or name in first.values()]
    return [name for name in named if errs_throughout(report.rows[name])]


def describe_settings(report: Report) -> str:
    """Set-up in one paragraph."""
    s, r = report.settings, report.record
    said = (
        f"{s['teacher']} ({s['architecture']}, {s['prediction']} prediction), held-out pairs {s['held_out_pairs']}, "
        f"{s['size']}x{s['size']}, {s['sampler']}, {s['steps']} steps, cfg {s['cfg']:g}, {s['precision']}, "
        f"on {r['hardware']}; torch {r['torch']}, ComfyUI {r['comfyui']}, commit {r['commit']}."
    )
    return " ".join(filter(None, [said, describe_files("Students", s["students"]), s["note"]]))


def describe_files(title: str, files: Mapping[str, str]) -> str:
    """Files with the hashes of `kept.name_file`: which ones were measured, whatever has taken their names since."""
    listed = ", ".join(f"{name} {content}" for name, content in files.items())
    return f"{title}, with the beginnings of their SHA-256: {listed}." if files else ""


def to_markdown(heading: str, report: Report, tables: list, plots: dict[str, tuple[str, bytes]]) -> str:
    """Set-up, tables, plots and what was left out."""
    lines = [f"# {heading}", "", describe_settings(report), "", f"`{report.record['command']}`", "", DEFINITIONS]
    for title, head, cells in tables:
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    lines += ["", *(f"![{caption}]({name})\n" for name, (caption, _) in plots.items())]
    if report.missing:
        lines += ["Left out: " + "; ".join(f"{name} ({why})" for name, why in report.missing.items()) + "."]
    return "\n".join(lines) + "\n"


def to_html(heading: str, report: Report, tables: list, plots: dict[str, tuple[str, bytes]]) -> str:
    """One page that needs no other file."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    pictures = [(caption, base64.b64encode(png).decode()) for caption, png in plots.values()]
    return environment.get_template("report.html.j2").render(
        heading=heading,
        settings=describe_settings(report),
        command=report.record["command"],
        definitions=DEFINITIONS,
        tables=tables,
        pictures=pictures,
        missing=report.missing,
    )


def write_report(report: Report, out: Path, stem: str) -> list[Path]:
    """Write `stem`.json, .md, .html, .png and the plots into a folder; the files that were written."""
    document = to_document(report)
    tables, plots = list_tables(report, document), draw_plots(report, stem)
    files = {name: png for name, (_, png) in plots.items()}
    files[f"{stem}.json"] = json.dumps(document, indent=1, allow_nan=False).encode()
    files[f"{stem}.md"] = to_markdown(stem.capitalize(), report, tables, plots).encode()
    files[f"{stem}.html"] = to_html(stem.capitalize(), report, tables, plots).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(out / name, content)
    return [out / name for name in files]
