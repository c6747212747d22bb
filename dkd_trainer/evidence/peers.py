"""What a user could pick instead of a student: ComfyUI's own ToMe and HyperTile, shorter keys, and fewer steps."""

from ..host import Teacher
from .contexts import builder_options, pool_keys, removed_options, stride_keys, window_options
from .subject import Build, Subject

STRIDES = (2, 3, 4)
PARTS = (2, 4)  # tiles and windows a side
TOME_RATIOS = (0.25, 0.5, 0.75)
STEP_SHARES = (0.64, 0.48, 0.4, 0.32)  # of the sampling's steps


def list_peers(levels: tuple[int, ...]) -> list[Subject]:
    """Every peer with the share of keys, or of tokens, that it keeps at the given levels."""
    return [
        *(strided(levels, stride) for stride in STRIDES),
        *(pooled(levels, stride) for stride in STRIDES),
        *(windowed(levels, parts) for parts in PARTS),
        *(tome(ratio) for ratio in TOME_RATIOS),
        *(hypertile(levels, parts) for parts in PARTS),
        removed(levels),
    ]


def list_fewer_steps(steps: int) -> list[Subject]:
    """The teacher itself with parts of `steps`: the simplest way to save time."""
    counts = dict.fromkeys(max(1, round(share * steps)) for share in STEP_SHARES)
    return [Subject(f"teacher, {n} steps", "teacher, fewer steps", label=f"{n} steps", steps=n) for n in counts]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def strided(levels: tuple[int, ...], stride: int) -> Subject:
    """ToDo's nearest down-sampling of keys and values."""
    name, builder = f"K/V strided by {stride} (1/{stride**2} of the keys)", stride_keys(stride)
    return patched(
        name, "K/V strided", f"{stride}", levels, lambda teacher, _: builder_options(teacher, builder, levels)
    )


def pooled(levels: tuple[int, ...], stride: int) -> Subject:
    """Keys and values of averaged tokens."""
    name, builder = f"K/V pooled by {stride} (1/{stride**2} of the keys)", pool_keys(stride)
    return patched(
        name, "K/V pooled", f"{stride}", levels, lambda teacher, _: builder_options(teacher, builder, levels)
    )


def windowed(levels: tuple[int, ...], parts: int) -> Subject:
    """Attention within windows that cut each side of the finest level into `parts`."""
    name = f"{parts}x{parts} windows (1/{parts**2} of the keys)"
    return patched(name, "windows", f"{parts}x{parts}", levels, lambda *_: window_options(parts, levels))


def removed(levels: tuple[int, ...]) -> Subject:
    """No token sees another."""
    return patched("attention removed", "removed", "", levels, lambda *_: removed_options(levels))


def patched(name: str, family: str, label: str, levels: tuple[int, ...], build: Build) -> Subject:
    """A peer at chosen levels."""
    return Subject(name, family, build, label, identity=str(levels))


def tome(ratio: float) -> Subject:
    """ComfyUI's own node *TomePatchModel*: it merges queries at the finest level."""

    def build(teacher: Teacher, _side: int) -> dict:
        from comfy_extras.nodes_tomesd import TomePatchModel

        return patcher_options(TomePatchModel.execute(teacher.model, ratio))

    return Subject(f"ToMe, {percent(ratio)} merged", "ToMe", build, percent(ratio))


def hypertile(levels: tuple[int, ...], parts: int) -> Subject:
    """ComfyUI's own node *HyperTile* with its default swap size, tiles that cut each side of the picture in `parts`."""
    depth = max(levels)

    def build(teacher: Teacher, side: int) -> dict:
        from comfy_extras.nodes_hypertile import HyperTile

        return patcher_options(HyperTile.execute(teacher.model, 8 * side // parts, 2, depth, False))

    return Subject(f"HyperTile, {parts}x{parts} tiles", "HyperTile", build, f"{parts}x{parts}", identity=str(depth))


def patcher_options(output) -> dict:
    """`transformer_options` of the model that a core node puts out; some nodes still answer with a plain tuple."""
    model = output[0] if isinstance(output, tuple) else output.args[0]
    return model.model_options["transformer_options"]
