"""What is timed: one SD-2.1 UNet in ComfyUI's hands, and the patched clones of it that share its weights."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dha.student import START_CONFIG

from .backends import BACKENDS
from .model import draw_weights, import_from_pack

TRAINED = asdict(START_CONFIG)
STUDENT = "DHA student (32 memory tokens, rank 8, local branch)"
# The most telling ones first: where time is short, the last ones are left out.
TITLES = {
    "unpatched": "unpatched",
    "dha-balanced": "DHA, training-free, preset balanced",
    "ceiling": "ceiling: no token mixing at all, projections kept",
    "student-balanced": f"{STUDENT}, preset balanced",
    "kv2": "K/V down-sampled by 2, finest level",
    "hypertile": "HyperTile 256 (core node)",
    "tome": "ToMe 0.5 (core node)",
    "dha-fast": "DHA, training-free, preset fast",
    "dha-quality": "DHA, training-free, preset quality",
    "student-fast": f"{STUDENT}, preset fast",
    "student-quality": f"{STUDENT}, preset quality",
    "dha-quality-late": "DHA, training-free, all steps as in the second half of preset quality",
    "kv2-two": "K/V down-sampled by 2, two finest levels",
    "official-0.5": "published DHA, sparsity 0.5, all levels",
    "official-0.1": "published DHA, sparsity 0.1, all levels",
}


@dataclass(frozen=True)
class Subject:
    """A ModelPatcher to time; all subjects of a run share one set of UNet weights."""

    name: str
    title: str
    model: Any


def is_wanted(name: str, wanted: Sequence[str]) -> bool:
    """Whether a subject, or the family before its dash, was asked for."""
    return name == "unpatched" or name in wanted or name.split("-")[0] in wanted


def build_subjects(model, wanted: Sequence[str], budgets: Sequence[float] = ()) -> list[Subject]:
    """The wanted subjects in the order of TITLES, the unpatched model always first; then DHA at each budget."""
    patchers = list_patchers()
    subjects = [Subject(n, title, patchers[n](model)) for n, title in TITLES.items() if is_wanted(n, wanted)]
    for budget in budgets:
        title = f"DHA, training-free, two finest levels, {budget:.4g} of the keys"
        subjects.append(Subject(f"dha-{budget:g}", title, patch_dha(model, budget=budget, levels="two finest")))
    return subjects


def switch_backend(subject: Subject, backend: str) -> Subject:
    """The same subject with another attention kernel in the place of ComfyUI's own choice."""
    if backend == "sdpa":
        return subject
    model, kernel = subject.model.clone(), BACKENDS[backend]()
    model.model_options["transformer_options"]["optimized_attention_override"] = kernel
    return Subject(subject.name, f"{subject.title}, {backend}", model)


def compile_subject(subject: Subject) -> Subject:
    """The same subject through ComfyUI's own node for torch.compile."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = unwrap(TorchCompileModel.execute(subject.model, "inductor"))
    return Subject(subject.name, f"{subject.title}, compiled", model)


def unwrap(output) -> Any:
    """The first output of a V3 node; some core nodes still answer with a plain tuple."""
    return output[0] if isinstance(output, tuple) else output.args[0]


def patch_dha(model, preset: str = "custom", student=None, budget: float = 0.125, levels: str = ""):
    """Through our own node, with the settings a user would choose."""
    node = import_from_pack("nodes.apply").ApplyDHA
    return unwrap(node.execute(model, levels or choose_levels(model), budget, 0.0, 1.0, student, preset))


def choose_levels(model) -> str:
    """`auto` where a device's layers were measured; elsewhere it leaves most as they are, and the original is timed."""
    return "auto" if import_from_pack("nodes.payoff").find_payoff(model).rows else "two finest"


def patch_stretch(model, stretch):
    """Training-free, all steps as in one stretch of a preset."""
    preset = import_from_pack("dha.presets").Preset((replace(stretch, end=1.0),))
    apply = import_from_pack("nodes.apply")
    return apply.apply_student(model, None, apply.LEVELS[choose_levels(model)], preset, 0.0, 1.0)


def name_steps(kind: str, preset: str) -> list[str]:
    """The subjects whose step is that of each stretch of a preset: of kind `dha`, or `student` while it is trained.

    A step is timed at the beginning of a sampling; what one preset does later another one mostly does there.
    """
    presets = import_from_pack("dha.presets").PRESETS
    beginnings = {(p.stretches[0].token_budget, p.stretches[0].max_tokens): name for name, p in presets.items()}
    names = []
    for stretch in presets[preset].stretches:
        twin = beginnings.get((stretch.token_budget, stretch.max_tokens), f"{preset}-late")
        names.append(f"{kind if stretch.trained else 'dha'}-{twin}")
    return names


def patch_student(model, preset: str = "custom", **settings):
    """A student with random weights, handed to ComfyUI as Load DHA Student does it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    config = import_from_pack("dha.config").DHAConfig(**settings)
    architecture = import_from_pack("dha.sites").read_architecture(model.model.diffusion_model.state_dict())
    device = comfy.model_management.get_torch_device()
    dtype = torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32
    width = model.model.model_config.unet_config["num_head_channels"]
    student = import_from_pack("dha.student").Student(config, architecture, comfy.ops.manual_cast, width)
    draw_weights(student.eval().requires_grad_(False), "student").to(dtype)
    patcher = comfy.model_patcher.ModelPatcher(student, device, comfy.model_management.unet_offload_device())
    loaded = import_from_pack("nodes.load").LoadedStudent("random student", {}, patcher)
    return patch_dha(model, preset, loaded, levels="auto" if config.mode == "official" else "")  # all of official ones


def patch_tome(model, ratio: float = 0.5):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return unwrap(TomePatchModel.execute(model, ratio))


def patch_hypertile(model, tile_size: int = 256):
    """The finest level alone, the node's default; a swap size of 1 always takes the smallest tiles: its best time."""
    from comfy_extras.nodes_hypertile import HyperTile

    return unwrap(HyperTile.execute(model, tile_size, swap_size=1, max_depth=0, scale_depth=False))


def patch_kv2(model, levels: int = 1, stride: int = 2):
    """ToDo's idea: all queries, but keys and values only from every second row and column of the finest levels."""

    def stride_context(n: Tensor, context: Tensor, value: Tensor, options: dict):
        height, width = options["activations_shape"][-2:]
        if context.shape[1] != height * width or height <= -(-options["original_shape"][-2] // 2**levels):
            return n, context, value
        context = context.unflatten(1, (height, width))[:, ::stride, ::stride].flatten(1, 2)
        return n, context, context

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


def list_patchers() -> dict[str, Callable]:
    """How each subject is made from the unpatched model, by name."""
    presets = import_from_pack("dha.presets").PRESETS
    everywhere = {"mode": "official", "levels": (0, 1, 2, 3)}
    return {
        "unpatched": lambda model: model.clone(),
        "ceiling": patch_ceiling,
        "kv2": patch_kv2,
        "kv2-two": partial(patch_kv2, levels=2),
        "hypertile": patch_hypertile,
        "tome": patch_tome,
        **{f"dha-{name}": partial(patch_dha, preset=name) for name in presets},
        "dha-quality-late": partial(patch_stretch, stretch=presets["quality"].stretches[-1]),
        **{f"student-{name}": partial(patch_student, preset=name, **TRAINED) for name in presets},
        **{f"official-{share:g}": partial(patch_student, sparsity=share, **everywhere) for share in (0.5, 0.1)},
    }
