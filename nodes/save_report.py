"""Save Report: the figures of our nodes as a JSON file beside the pictures in ComfyUI's output folder."""

import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..dha.whole_file import write_whole
from .tables import read_report, show_text


class SaveReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DHASaveReport",
            display_name="Save DHA Report",
            category="DHA/compare",
            description="Saves the report of Compare Models, Compare Pictures or DHA Benchmark as a JSON file in the "
            "output folder.",
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
        fields = read_report(report, "Save DHA Report")
        path = save(fields, filename_prefix)
        shown = path.relative_to(folder_paths.get_output_directory()).as_posix()
        show_text(cls.hidden.unique_id, f"saved output/{shown}")
        return io.NodeOutput(ui={"text": (shown,)})


def save(fields: dict, prefix: str) -> Path:
    """Write a new file in one go; its path. Raises what ComfyUI raises for a prefix that leads out of the folder."""
    output = folder_paths.get_output_directory()
    folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, output)
    path = Path(folder) / f"{name}_{counter:05}_.json"
    write_whole(path, (json.dumps(fields, indent=1) + "\n").encode())
    return path
