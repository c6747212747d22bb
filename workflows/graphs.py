"""The graphs of this project in API format, and the pieces that they are made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .server import Graph

FOLDER = Path(__file__).resolve().parent
CHECKPOINT, STUDENT = "mini-sd21.safetensors", "mini-sd21-dha.safetensors"


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
    graph["7"] = node("DHACompareModels", original=["1", 0], student=patched, **sampling, repeats=repeats)
    return graph


def compare(checkpoint: str, picture: Picture, student: str | None = None, **settings: Any) -> Graph:
    """Both models, both pictures (nodes 10, 11 preview them) and the comparison (node 12 measures, 13 saves)."""
    graph = time_models(checkpoint, picture, student, **settings)
    graph |= {
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("VAEDecode", samples=["7", 1], vae=["1", 2]),
        "10": node("PreviewImage", images=["8", 0]),
        "11": node("PreviewImage", images=["9", 0]),
        "12": node("DHAComparePictures", original=["8", 0], student=["9", 0], amplify=4.0, report=["7", 2]),
        "13": node("SaveImage", images=["12", 0], filename_prefix="dha-compare"),
    }
    return graph
