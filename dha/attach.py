"""A student in the UNet of a host without ComfyUI's patches, by torch's hooks; taken off, it leaves nothing behind."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .dither import find_phase
from .patch import STATE, Patches, make_patches, plain_attention
from .planner import Pays
from .presets import Preset
from .sites import SITES, Site
from .student import Student

STRETCH = "dha_stretch"  # key in our options for the number of the stretch that the running forward lies in
PHASE = "dha_phase"  # key in our options for the phase of the running forward's grids


def attach(unet: nn.Module, student: Student, spending: Preset, pays: Pays | None = None) -> Callable[[], None]:
    """Run `student` inside `unet`, where it `pays` as for `make_patches`; returns what takes it off again.

    The modules of `unet` are named and called as in Stable Diffusion's published code. Calls of a self-attention with a
    context of somebody else's making, or with tokens that were merged, are left to the layer itself.
    """
    is_hybrid = student.config.mode == "hybrid"
    patches = make_patches(
        student,
        plain_attention,
        spending.stretches,
        find_stretch=lambda options: options[STRETCH],
        pays=pays,
        phase_of=lambda options: options[PHASE],
    )
    options = patches.as_options()

    def begin(_module, _inputs, emb: Tensor) -> None:
        with torch.inference_mode(False):  # its weights outlive this picture
            student.to(emb.device, emb.dtype)
        patches.emb(emb, 0, options)

    def ask_ahead(_module, inputs: tuple, named: dict) -> None:
        timesteps = named["timesteps"] if "timesteps" in named else inputs[1]
        options[PHASE] = find_phase(timesteps)
        options[STRETCH] = spending.find_stretch(timesteps[0].item()) if is_hybrid else 0

    restore = [unet.register_forward_pre_hook(ask_ahead, with_kwargs=True).remove]
    restore.append(unet.time_embed.register_forward_hook(begin).remove)
    for site in SITES:
        if site.block in patches.blocks:
            layer = unet.get_submodule(site.name)
            holder = unet.get_submodule(site.name.partition(".transformer_blocks.")[0])
            note = note_size(options, site)
            restore.append(holder.register_forward_pre_hook(note).remove)
            restore.append(set_value(layer, "forward", make_forward(layer, site, patches, options)))
    for path, value in student.list_attributes(patches.blocks).items():
        place, _, name = path.rpartition(".")
        restore.append(set_value(unet.get_submodule(place), name, value))

    def take_off() -> None:
        while restore:
            restore.pop()()
        options.clear()  # a forward of ours that somebody wrapped in the meantime does nothing from now on

    return take_off


def note_size(options: dict, site: Site) -> Callable:
    """A hook that notes the shape (B, C, H, W) of what enters the transformer around a self-attention."""

    def note(_module, inputs: tuple) -> None:
        options[site] = inputs[0].shape

    return note


def make_forward(layer: nn.Module, site: Site, patches: Patches, options: dict) -> Callable:
    """A self-attention's forward with the student in it; `options` are those of the running UNet forward."""
    original = layer.forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        given = [other for other in (*args, *kwargs.values()) if isinstance(other, Tensor)]
        here = {**options, "block": site.block, "activations_shape": options.get(site), "n_heads": layer.heads}
        if all(other is x for other in given):
            n, keys, values = patches.attn1(x, x, x, here)
        if STATE not in here:
            return original(x, *args, **kwargs)
        out = patches.replace(layer.to_q(n), layer.to_k(keys), layer.to_v(values), here)
        return patches.middle(patches.output(layer.to_out(out), here), here)

    return forward


def set_value(owner: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Give a module an attribute of its own; returns what puts the one from before back, unless another came since."""
    before = dict(vars(owner))
    vars(owner)[name] = value

    def put_back() -> None:
        if vars(owner).get(name) is not value:
            return
        del vars(owner)[name]
        if name in before:
            vars(owner)[name] = before[name]

    return put_back
