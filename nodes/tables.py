"""What our nodes show in the browser: one line, a table, and the report behind them."""

import json
from html import escape
from typing import Any

from server import PromptServer

Table = list[list[str]]
MISSING = "-"


def show_text(node_id: str, text: str) -> None:
    """Write a line on the node in the browser that queued it, if a browser did."""
    server = PromptServer.instance
    if server.client_id is not None:  # ComfyUI would send it to everybody
        server.send_progress_text(escape(text), node_id, server.client_id)  # the browser takes it for HTML


def show_report(report: dict[str, Any], summary: str, table: Table) -> tuple[str, dict[str, Any]]:
    """The report as JSON, and what the browser gets: the same, one line, and a table whose first row is its head."""
    text = json.dumps(report, indent=1)
    return text, {"text": (text,), "summary": (summary,), "table": (json.dumps(table),)}


def read_report(report: str, node: str, makers: str) -> dict[str, Any]:
    """The fields of a report that comes from one of `makers`; raises ValueError where it is empty or something else."""
    try:
        fields = json.loads(report)
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict) or not fields:
        raise ValueError(
            f"{node} found {report[:40]!r} as report and expected a JSON object with figures; connect the report "
            f"output of {makers}."
        )
    return fields


def show_number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return MISSING if value is None else f"{value:.{digits}f}{unit}"


def show_bytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def is_timed(report: dict[str, Any]) -> bool:
    """Whether a report has all that Compare Models says of its two models, and not some of it by chance."""
    runs = [report.get(name) for name in ("original", "student")]
    are_runs = all(isinstance(run, dict) and {"seconds", "seconds_per_step"} <= run.keys() for run in runs)
    return are_runs and {"speedup", "width", "height"} <= report.keys()


def tabulate_runs(report: dict[str, Any]) -> Table:
    """Rows for two timed models, from their part of a report."""
    original, student = report["original"], report["student"]
    rows = [["", "original", "student"]]
    for title, key in (("seconds per step", "seconds_per_step"), ("seconds in total", "seconds")):
        rows.append([title, show_number(original[key], 3), show_number(student[key], 3)])
    for title, key in (("peak memory of a step", "peak_memory"), ("weights", "weights")):
        rows.append([title, show_bytes(original.get(key)), show_bytes(student.get(key))])
    return [*rows, ["speed", "1.00x", show_number(report["speedup"], 2, "x")]]
