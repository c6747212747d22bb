"""What is timed: one SD-2.1 UNet in ComfyUI's hands, and the patched clones of it that share its weights."""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..fullsize import UNET
from ..server import PACK

PACKAGE = "dha_pack"  # the name under which this repository is imported as ComfyUI would import it
KINDS = {
    "unpatched": "unpatched, PyTorch's fused attention",
    "dha": "DHA, training-free, two finest levels",
    "student": "DHA student (router, 16 memory tokens, rank 8), two finest levels",
    "tome": "ToMe 0.5 (core node)",
    "hypertile": "HyperTile 256 (core node)",
    "kv2": "K/V down-sampled by 2, finest level",
    "ceiling": "no token mixing at all, projections kept",
}
BUDGETED = ("dha", "student")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 1 << 22  # weights drawn at once: their float32 buffer stays small beside the model


@dataclass(frozen=True)
class Subject:
    """A ModelPatcher to time; all subjects of a run share one set of UNet weights."""

    name: str
    title: str
    model: Any


def import_from_pack(name: str) -> ModuleType:
    """A module of this pack such as `nodes.apply`, with its relative imports working.

    The `__init__` of the pack and of `nodes` are passed over: they bring in ComfyUI's server and with it ComfyUI's
    top-level module `nodes`, which our folder of that name hides from programs started in the repository.
    """
    for package, folder in ((PACKAGE, PACK), (f"{PACKAGE}.nodes", PACK / "nodes")):
        if package not in sys.modules:
            spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")


def draw_weights(model: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """Fill a module in place with a variance of 1 / fan-in, so that activations neither vanish nor overflow in fp16."""
    generator, buffer = torch.Generator().manual_seed(seed), torch.empty(CHUNK)
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    with torch.no_grad(), tqdm(total=total, desc=f"random {name}", unit="weight", unit_scale=True, delay=1) as bar:
        for key, parameter in parameters.items():
            if parameter.ndim <= 1:
                parameter.fill_(1.0 if key.endswith("weight") else 0.0)
                continue
            deviation = parameter[0].numel() ** -0.5
            for part in parameter.data.view(-1).split(CHUNK):
                part.copy_(buffer[: len(part)].normal_(0, deviation, generator=generator))
                bar.update(len(part))
    return model


def build_model(dtype: torch.dtype, mini: bool):
    """A ModelPatcher around SD-2.1's UNet, full-size or mini, with random weights in `dtype`; no file is read."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if mini:
        architecture = import_from_pack("nodes.mini_sd21").MiniSD21
        config = architecture({**UNET, **architecture.unet_config})
    else:
        config = comfy.supported_models.SD20(dict(UNET))
    config.set_inference_dtype(dtype, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload).eval().requires_grad_(False)
    draw_weights(model.diffusion_model, "UNet")
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), offload)


def load_model(path: Path, dtype: torch.dtype):
    """A checkpoint's ModelPatcher, weights in `dtype`, as the stock loader makes it; text encoder and VAE are left out.

    Raises FileNotFoundError for a missing file, RuntimeError or ArchitectureError for one that is no SD-2.1.
    """
    import comfy.sd

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; without --checkpoint random weights are timed")
    import_from_pack("nodes.mini_sd21").register()
    options = {"dtype": dtype}
    model = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=False, model_options=options
    )[0]
    import_from_pack("dha.sites").read_architecture(model.model.diffusion_model.state_dict())
    return model


def build_subjects(model, kinds: Sequence[str], budgets: Sequence[float]) -> list[Subject]:
    """The chosen kinds in the order of KINDS, the unpatched model always first; DHA once for each budget."""
    subjects = []
    for kind, title in KINDS.items():
        if kind != "unpatched" and kind not in kinds:
            continue
        if kind in BUDGETED:
            for budget in budgets:
                patched = PATCHERS[kind](model, budget)
                subjects.append(Subject(f"{kind}-{budget:g}", f"{title}, {budget:.4g} of the keys", patched))
        else:
            subjects.append(Subject(kind, title, PATCHERS[kind](model)))
    return subjects


def unwrap(output) -> Any:
    """The first output of a V3 node; some core nodes still answer with a plain tuple."""
    return output[0] if isinstance(output, tuple) else output.args[0]


def patch_dha(model, budget: float, student=None):
    """Through our own node, with the settings a user would choose."""
    node = import_from_pack("nodes.apply").ApplyDHA
    return unwrap(node.execute(model, "two finest", budget, 0.0, 1.0, student))


def patch_student(model, budget: float):
    """A student with every trained part and random weights, handed to ComfyUI as Load DHA Student does it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    config = import_from_pack("dha.config").DHAConfig(levels=(0, 1), memory=16, rank=8, router_width=64)
    architecture = import_from_pack("dha.sites").read_architecture(model.model.diffusion_model.state_dict())
    device = comfy.model_management.get_torch_device()
    dtype = torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32
    student = import_from_pack("dha.student").Student(config, architecture, comfy.ops.manual_cast)
    draw_weights(student.eval().requires_grad_(False), "student").to(dtype)
    patcher = comfy.model_patcher.ModelPatcher(student, device, comfy.model_management.unet_offload_device())
    return patch_dha(model, budget, import_from_pack("nodes.load").LoadedStudent("random student", {}, patcher))


def patch_tome(model, ratio: float = 0.5):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return unwrap(TomePatchModel.execute(model, ratio))


def patch_hypertile(model, tile_size: int = 256):
    """The finest level alone, the node's default; a swap size of 1 always takes the smallest tiles: its best time."""
    from comfy_extras.nodes_hypertile import HyperTile

    return unwrap(HyperTile.execute(model, tile_size, swap_size=1, max_depth=0, scale_depth=False))


def stride_context(n: Tensor, context: Tensor, value: Tensor, options: dict, stride: int = 2):
    """ToDo's idea: all queries, but keys and values only from every second row and column of the finest level."""
    height, width = options["original_shape"][-2:]
    if context.shape[1] != height * width:
        return n, context, value
    context = context.unflatten(1, (height, width))[:, ::stride, ::stride].flatten(1, 2)
    return n, context, context


def patch_kv2(model):
    patched = model.clone()
    patched.set_model_attn1_patch(stride_context)
    return patched


def skip_mixing(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    """Every token answers itself: what a step costs when attention proper is free and the projections are not."""
    return v


def patch_ceiling(model):
    patched = model.clone()
    for site in import_from_pack("dha.sites").SITES:
        patched.set_model_attn1_replace(skip_mixing, *site.block)
    return patched


PATCHERS: dict[str, Callable] = {
    "unpatched": lambda model: model.clone(),
    "dha": partial(patch_dha, student=None),
    "student": patch_student,
    "tome": patch_tome,
    "hypertile": patch_hypertile,
    "kv2": patch_kv2,
    "ceiling": patch_ceiling,
}
