"""Graphs with frequency control: one for each task, and a comparison of the steered teacher with its DHA student."""

from dataclasses import dataclass, replace
from typing import Any

from .graphs import Picture, add_student, draw, node
from .server import Graph

BESIDE = {"direction": "right", "match_image_size": False, "spacing_width": 0, "spacing_color": "white"}
CAT, KOALA = "cat, twitter style, green background", "koala, glossy 3d style, pink background"


@dataclass(frozen=True)
class Task:
    """What a band is for: prompts of a source and of what is drawn after it, and the file of the control."""

    title: str
    source: str
    prompt: str
    control: str


TASKS = {
    "mini": Task(
        "Style-guided creation",
        "rose, flat style, sky blue background",
        "owl, noto style",
        "mini-sd21-mini.safetensors",
    ),
    "low": Task("Semantic manipulation", CAT, "dog, twitter style, green background", "mini-sd21-low.safetensors"),
    "mid": Task(
        "Scene translation",
        CAT,
        "cat, twitter style, yellow background",
        "mini-sd21-mid.safetensors",
    ),
    "high": Task("Style translation", KOALA, "koala, noto style, pink background", "mini-sd21-high.safetensors"),
}


def steer(
    checkpoint: str, picture: Picture, task: Task, student: str | None = None, strength: float = 1.0, **settings: Any
) -> Graph:
    """Draw the source (nodes 10 to 13), then anew after the task's prompt (node 9 saves it); a student is node 6.

    For a picture of one's own, Load Image and VAE Encode take the place of nodes 10 and 11. `settings` are Apply DHA's.
    """
    graph = draw(checkpoint, replace(picture, prompt=task.prompt))
    model = ["1", 0] if student is None else add_student(graph, student, settings)
    source = {**picture.sampling(["4", 0]), "positive": ["10", 0]}
    graph |= {
        "10": node("CLIPTextEncode", text=task.source, clip=["1", 1]),
        "11": node("KSampler", model=["1", 0], **source),
        "12": node("VAEDecode", samples=["11", 0], vae=["1", 2]),
        "13": node("PreviewImage", images=["12", 0]),
        "14": node("DHALoadFrequencyControl", control_name=task.control),
        "15": apply_control(model, strength, student is not None),
    }
    graph["7"]["inputs"] |= {"model": ["15", 0], "seed": picture.seed + 1}
    return graph


def apply_control(model: list, strength: float = 1.0, accelerate: bool = False) -> dict[str, Any]:
    """Apply Frequency Control to a model's output, for the whole of the sampling."""
    settings = {"strength": strength, "start_percent": 0.0, "end_percent": 1.0, "shuffle_seed": 0}
    settings["accelerate"] = accelerate
    return node("DHAApplyFrequencyControl", model=model, control=["14", 0], source=["11", 0], **settings)


def show_band(graph: Graph, band: str) -> None:
    """Add what the band keeps of the source, node 17 previews it."""
    kept = {"samples": ["11", 0], "vae": ["1", 2], "band": band, "scaled": True, "shuffle_seed": 0}
    graph |= {"16": node("DHAFrequencyFilter", **kept), "17": node("PreviewImage", images=["16", 1])}


def compare_steered(checkpoint: str, picture: Picture, task: Task, student: str, **settings: Any) -> Graph:
    """Source | steered teacher | steered student | their difference (22 measures), saved as one picture (23)."""
    graph = steer(checkpoint, picture, task, student, **settings)
    for drawn in ("7", "8", "9"):
        del graph[drawn]
    sampling = {**picture.sampling(["4", 0]), "seed": picture.seed + 1}
    graph |= {
        "16": apply_control(["1", 0]),
        "17": node("DHACompareModels", original=["16", 0], student=["15", 0], **sampling, repeats=1),
        "18": node("VAEDecode", samples=["17", 0], vae=["1", 2]),
        "19": node("VAEDecode", samples=["17", 1], vae=["1", 2]),
        "20": node("PreviewImage", images=["18", 0]),
        "21": node("PreviewImage", images=["19", 0]),
        "22": node("DHAComparePictures", original=["18", 0], student=["19", 0], amplify=4.0, report=["17", 2]),
        "23": node("SaveImage", images=["24", 0], filename_prefix="dha-control"),
        "24": node("ImageStitch", image1=["12", 0], image2=["22", 0], **BESIDE),
    }
    return graph
