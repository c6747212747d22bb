"""Save Report: the figures of our nodes as a JSON file beside the pictures in ComfyUI's output folder."""

import json
import os
from itertools import count
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..dha.whole_file import write_whole
from .tables import read_report, show_text

MAKERS = "Compare Models, Compare Pictures, DHA Benchmark, DHA Routing Map, DKD Train or DKD Training Record"


class SaveReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHASaveReport",
            display_name="Save DHA Report",
            category="DHA/compare",
            description=f"Saves the report of {MAKERS} as a JSON file in the output folder.",
            is_output_node=True,
            inputs=[
                io.String.Input("report", force_input=True, tooltip="The report output of one of the DHA nodes."),
                io.String.Input(
                    "filename_prefix",
                    default="dha-report",
                    tooltip="Beginning of the file's name, with a folder if you like; a number and .json follow.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, report: str, filename_prefix: str) -> io.NodeOutput:
        fields = read_report(report, "Save DHA Report", MAKERS)
        path = save(fields, filename_prefix)
        shown = path.relative_to(folder_paths.get_output_directory()).as_posix()
        show_text(cls.hidden.unique_id, f"saved output/{shown}")
        return io.NodeOutput(ui={"text": (shown,)})


def save(fields: dict, prefix: str) -> Path:
    """Write a new file in one go; its path. Raises ValueError for a prefix without a name.

    Raises what ComfyUI raises for a prefix that leads out of the folder.
    """
    place = os.path.normpath(prefix.strip())  # ComfyUI does so for the name, but not where it counts files of that name
    if Path(place).name in ("", ".."):
        raise ValueError(
            f"Save DHA Report found {prefix!r} as filename_prefix and expected the beginning of a file's name, such as "
            "dha-report or reports/owl."
        )
    folder, name, number, *_ = folder_paths.get_save_image_path(place, folder_paths.get_output_directory())
    paths = (Path(folder) / f"{name}_{each:05}_.json" for each in count(number))
    path = next(path for path in paths if not path.exists())
    write_whole(path, (json.dumps(fields, indent=1) + "\n").encode())
    return path
