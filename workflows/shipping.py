"""Write the shipped workflows anew, as the nodes are now; with --thumbnails run them, for pictures and run times."""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from dha.whole_file import write_whole

from .control_examples import CONTROL
from .examples import EXAMPLES as SMALL
from .formats import to_api
from .graphs import FOLDER
from .machine import describe_machine
from .run_times import make_own, write_times
from .server import Server, find_comfyui, serve
from .training_graphs import TRAINING

EXAMPLES = {**SMALL, **CONTROL, **TRAINING}
SIDE = 384  # pixels of a thumbnail
PATIENCE = 3600  # seconds for one workflow; one of them trains
PAPER = (24, 24, 26)


def build_workflows(object_info: dict) -> dict[str, dict]:
    """The shipped workflows in UI format by name."""
    return {name: make().build(object_info) for name, make in EXAMPLES.items()}


def draw_thumbnails(server: Server, workflows: dict[str, dict]) -> Iterator[tuple[str, bytes, float]]:
    """Run every workflow; its name, its thumbnail as JPEG and the seconds it took alone. Raises ServerError."""
    object_info = server.get("/object_info")
    graphs = {name: to_api(ui, object_info) for name, ui in workflows.items()}
    server.run(make_own(next(iter(graphs.values())), "warm-up"), timeout=PATIENCE)
    for name, graph in graphs.items():
        begun = time.monotonic()
        outcome = server.run(make_own(graph, name), timeout=PATIENCE)
        seconds = time.monotonic() - begun
        shown = [server.fetch(outcome.outputs[node][key][0]) for node, key in EXAMPLES[name]().shown]
        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in shown]
        buffer = io.BytesIO()
        frame(join(pictures)).save(buffer, "JPEG", quality=85)
        yield name, buffer.getvalue(), seconds


def join(pictures: list[Image.Image]) -> Image.Image:
    """One picture as it is; of two the left half of the first and the right half of the second, as under a slider.

    More of them stand side by side.
    """
    first, last = pictures[0], pictures[-1]
    if len(pictures) == 1:
        return first
    if len(pictures) > 2:
        strip = Image.new("RGB", (first.width * len(pictures), first.height))
        for number, picture in enumerate(pictures):
            strip.paste(picture.resize(first.size), (number * first.width, 0))
        return strip
    joined, middle = first.copy(), first.width // 2
    joined.paste(last.resize(first.size).crop((middle, 0, *first.size)), (middle, 0))
    ImageDraw.Draw(joined).line((middle, 0, middle, first.height), "white")
    return joined


def frame(picture: Image.Image) -> Image.Image:
    """A square thumbnail with the whole picture in it."""
    scale = SIDE / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", help="folder of a ComfyUI (default: COMFYUI_PATH)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the files (default: this package)")
    parser.add_argument("--thumbnails", action="store_true", help="run all: NAME.jpg and results/run-times.*")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, help="these workflows; run times are left as they are")
    arguments = parser.parse_args()
    print("Starting a ComfyUI ...", flush=True)
    with tempfile.TemporaryDirectory() as base, serve(find_comfyui(arguments.comfyui), Path(base)) as server:
        workflows = build_workflows(server.get("/object_info"))
        workflows = {name: workflows[name] for name in arguments.only or workflows}
        for name, ui in workflows.items():
            write_whole(arguments.out / f"{name}.json", (json.dumps(ui, indent=1) + "\n").encode())
            print(f"{name}.json: {len(ui['nodes'])} nodes", flush=True)
        if arguments.thumbnails:
            times, machine = {}, describe_machine(server, "workflows.shipping")
            for name, thumbnail, times[name] in draw_thumbnails(server, workflows):
                write_whole(arguments.out / f"{name}.jpg", thumbnail)
                print(f"{name}.jpg: {len(thumbnail) / 1000:.0f} kB after {times[name]:.1f} s", flush=True)
            if not arguments.only:
                write_times(arguments.out / "results", times, machine)


if __name__ == "__main__":
    main()
