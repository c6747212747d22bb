"""The demo's two measurements: quality on the mini SD-2.1, speed at full size."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from ..formats import fill_defaults
from ..fullsize import FREE_BYTES, run_writer
from ..graphs import Picture, compare, node, time_models
from ..server import Graph, Outcome, Server
from .results import Comparison

# The flat duck and the noto tulip were kept from the training; ducks and tulips of other styles were not.
PROMPTS = (
    "koala, glossy 3d style, pink background",
    "deciduous tree left of palm tree, flat style, sky blue background",
    "duck, flat style, green background",
    "two mirrored tulip, noto style, white background",
    "checkerboard of tulip and tiger face, noto style, green background",
    "penguin, gradient style, gray background",
    "owl, noto style, yellow background",
    "unicorn, glossy 3d style, purple background",
)
FULLSIZE = "sd21-base-random.safetensors"
# ComfyUI keeps weights in bf16 on a processor, but computes in it only where ModelComputeDtype says so.
BF16_FLAGS = ("--cpu", "--bf16-unet")
# The checkpoint, weights, activations at 768, and the server itself; 7.3 GB were seen at the peak in fp32 at 512.
MEMORY_BYTES = 9_000_000_000


class GraphBar:
    """A progress bar of one graph: the node that runs, and its steps."""

    def __init__(self, graph: Graph, title: str):
        self.graph, self.title = graph, title
        self.bar = tqdm(total=1, bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {elapsed}")
        self.name("waiting")

    def name(self, what: str) -> None:
        self.bar.set_description_str(f"{self.title} {what:<22}")

    def __call__(self, node: str, value: int, total: int) -> None:
        self.name(self.graph.get(node, {}).get("class_type", ""))
        # Only sampling counts steps; the nodes before and after it would set the bar back.
        if total > 1:
            self.bar.total, self.bar.n = total, value
        self.bar.refresh()

    def run(self, server: Server, timeout: float) -> Outcome:
        """Raises ServerError as `Server.run` does."""
        with self.bar:
            outcome = server.run(self.graph, self, timeout)
            self.name("done")
        return outcome


def compare_prompts(
    server: Server, checkpoint: str, student: str, prompts: Sequence[str], steps: int
) -> Iterator[Comparison]:
    """Run the compare graph for every prompt; raises ServerError."""
    info = server.get("/object_info")
    for number, prompt in enumerate(prompts, start=1):
        picture = Picture(prompt, steps=steps, seed=number)
        graph = fill_defaults(compare(checkpoint, picture, student, preset="balanced"), info)
        outcome = GraphBar(graph, f"  {number}/{len(prompts)} {prompt[:48]:<48}").run(server, 300)
        pictures = [server.fetch(outcome.images(node)[0]) for node in ("10", "11", "13")]
        yield Comparison(prompt, json.loads(outcome.text("12")), *pictures)


def time_checkpoint(server: Server, checkpoint: str, size: int, repeats: int, dtype: str = "") -> dict[str, Any]:
    """Compare Models' report on one step of `size` x `size` pixels, training-free DHA, without guidance.

    In `dtype` (`bf16`) where one is named.
    """
    picture = Picture("a photo of a cat", width=size, height=size, steps=1, cfg=1.0)
    graph = time_models(checkpoint, picture, repeats=repeats)
    # Without guidance the negative prompt is not used: the positive one saves a pass of the text encoder.
    del graph["3"]
    graph["7"]["inputs"]["negative"] = ["2", 0]
    if dtype:
        graph["3"] = node("ModelComputeDtype", model=["1", 0], dtype=dtype)
        graph["6"]["inputs"]["model"] = graph["7"]["inputs"]["original"] = ["3", 0]
    graph = fill_defaults(graph, server.get("/object_info"))
    return json.loads(GraphBar(graph, f"  {size}x{size}, one step, {repeats} runs each").run(server, 900).text("7"))


def find_obstacle(folder: Path) -> str:
    """Why the full-size checkpoint cannot be written to `folder` or run here; empty when it can."""
    disk, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if disk < FREE_BYTES:
        return f"Not measured: {disk / 1e9:.1f} GB free on the disk of {folder}, {FREE_BYTES / 1e9:.0f} GB needed."
    if memory < MEMORY_BYTES:
        return f"Not measured: {memory / 1e9:.1f} GB of memory available, {MEMORY_BYTES / 1e9:.0f} GB needed."
    return ""


def time_fullsize(
    server: Server, comfyui: Path, base: Path, dtype: str = "", size: int = 768, repeats: int = 3
) -> dict[str, Any]:
    """Write the random full-size checkpoint under the server's models, time it (in `dtype`), delete it."""
    checkpoint = base / "models" / "checkpoints" / FULLSIZE
    try:
        run_writer(comfyui, checkpoint)
        return time_checkpoint(server, FULLSIZE, size, repeats, dtype)
    finally:
        checkpoint.unlink(missing_ok=True)
