"""The graphs of this project, and the command that writes the shipped ones."""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import to_ui
from .server import Graph, find_comfyui, serve

FOLDER = Path(__file__).resolve().parent
CHECKPOINT, STUDENT = "mini-sd21.safetensors", "mini-sd21-dha.safetensors"

SMALLEST_NOTE = """## The smallest graph
The mini SD-2.1 that comes with this pack draws 128x128 emoji art, animals and food, with a DHA student in place of
part of its self-attention. Bypass *Apply DHA* (Ctrl+B) to see the original.

**With your own SD-2.1:** choose the checkpoint, set the size to 512 or more, and choose a student of that architecture.
Without one, bypass or delete *Load DHA Student*: *Apply DHA* then works training-free."""
COMPARE_NOTE = """## The same prompt and seed, twice
*Compare Models* runs the original and the student from the same noise and times both. *Compare Pictures* shows
original | student | difference.

**Mini model:** 128x128, animals and food, prompts such as `red apple left of lemon, noto style, sky blue background`.
Here self-attention costs next to nothing, so look at the difference here, not at the seconds.

**With your own SD-2.1:** choose the checkpoint, set the size to 512 or more (the larger, the more DHA saves), cfg to
about 7, and a student of that architecture. Without one, delete *Load DHA Student*: *Apply DHA* then works
training-free. `repeats` of 3 or more gives firmer seconds."""


@dataclass(frozen=True)
class Picture:
    """What to draw, and how."""

    prompt: str
    negative: str = ""
    width: int = 128
    height: int = 128
    seed: int = 1
    steps: int = 25
    cfg: float = 4.0
    sampler: str = "euler"
    scheduler: str = "normal"

    def sampling(self, latent: list) -> dict[str, Any]:
        """KSampler's inputs without its model, for the conditionings of `prepare`."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "cfg": self.cfg,
            "sampler_name": self.sampler,
            "scheduler": self.scheduler,
            "positive": ["2", 0],
            "negative": ["3", 0],
            "latent_image": latent,
            "denoise": 1.0,
        }


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def prepare(checkpoint: str, picture: Picture) -> Graph:
    """Nodes 1 to 4: checkpoint, both prompts, empty latent."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("CLIPTextEncode", text=picture.prompt, clip=["1", 1]),
        "3": node("CLIPTextEncode", text=picture.negative, clip=["1", 1]),
        "4": node("EmptyLatentImage", width=picture.width, height=picture.height, batch_size=1),
    }


def add_student(graph: Graph, student: str | None, settings: dict[str, Any]) -> list:
    """Node 6, and 5 where a student file is named; the patched model's output."""
    inputs = {"model": ["1", 0], **settings}
    if student:
        graph["5"] = node("LoadDHAStudent", student_name=student)
        inputs["student"] = ["5", 0]
    graph["6"] = node("ApplyDHA", **inputs)
    return ["6", 0]


def draw(checkpoint: str, picture: Picture) -> Graph:
    """Text to image with the original model; node 9 saves the picture."""
    graph = prepare(checkpoint, picture)
    graph["7"] = node("KSampler", model=["1", 0], **picture.sampling(["4", 0]))
    graph["8"] = node("VAEDecode", samples=["7", 0], vae=["1", 2])
    graph["9"] = node("SaveImage", images=["8", 0], filename_prefix="dha")
    return graph


def draw_with_student(checkpoint: str, picture: Picture, student: str | None = None, **settings: Any) -> Graph:
    """Text to image through Apply DHA (node 6, whose settings may be given); node 9 saves the picture."""
    graph = draw(checkpoint, picture)
    graph["7"]["inputs"]["model"] = add_student(graph, student, settings)
    return dict(sorted(graph.items()))


def time_models(
    checkpoint: str, picture: Picture, student: str | None = None, repeats: int = 1, **settings: Any
) -> Graph:
    """Compare Models alone (node 7), nothing decoded."""
    graph = prepare(checkpoint, picture)
    patched = add_student(graph, student, settings)
    sampling = picture.sampling(["4", 0])
    graph["7"] = node("CompareModels", original=["1", 0], student=patched, **sampling, repeats=repeats)
    return graph


def compare(checkpoint: str, picture: Picture, student: str | None = None, **settings: Any) -> Graph:
    """Both models, both pictures (nodes 10, 11 preview them) and the comparison (node 12 measures, 13 saves)."""
    graph = time_models(checkpoint, picture, student, **settings)
    graph |= {
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("VAEDecode", samples=["7", 1], vae=["1", 2]),
        "10": node("PreviewImage", images=["8", 0]),
        "11": node("PreviewImage", images=["9", 0]),
        "12": node("ComparePictures", original=["8", 0], student=["9", 0], amplify=4.0, report=["7", 2]),
        "13": node("SaveImage", images=["12", 0], filename_prefix="dha-compare"),
        "14": node("PreviewAny", source=["12", 1]),
    }
    return graph


def build_examples(object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The shipped graphs in UI format by file name."""
    picture = Picture("red apple left of lemon, noto style, sky blue background")
    start = {"1": (0, 0), "5": (0, 4), "2": (1, 0), "3": (1, 5), "4": (1, 10), "6": (1, 15)}
    small = {**start, "7": (2, 0), "8": (2, 8), "9": (3, 0)}
    large = {**start, "7": (2, 0), "8": (2, 10), "9": (2, 13), "10": (3, 0), "11": (4, 0), "12": (3, 6), "13": (5, 0)}
    large["14"] = (5, 6)
    smallest = draw_with_student(CHECKPOINT, picture, STUDENT)
    return {
        "smallest.json": to_ui(smallest, object_info, small, SMALLEST_NOTE),
        "compare.json": to_ui(compare(CHECKPOINT, picture, STUDENT), object_info, large, COMPARE_NOTE),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file in one go: it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the example graphs anew, as the nodes are now.")
    parser.add_argument("--comfyui", help="folder of a ComfyUI (default: COMFYUI_PATH)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON files (default: this package)")
    arguments = parser.parse_args()
    print("Asking a ComfyUI what its nodes look like ...", flush=True)
    with tempfile.TemporaryDirectory() as base, serve(find_comfyui(arguments.comfyui), Path(base)) as server:
        object_info = server.get("/object_info")
    for name, ui in build_examples(object_info).items():
        write_text(arguments.out / name, json.dumps(ui, indent=1) + "\n")
        print(f"{arguments.out / name}: {len(ui['nodes'])} nodes")


if __name__ == "__main__":
    main()
