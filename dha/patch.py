"""A student as plain callables of ComfyUI's UNet patch protocol; it imports no host, the trainer uses the same ones."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dither import find_phase, list_phases
from .hybrid import HybridSite, Mixing
from .official import OfficialSite
from .planner import Pays, Planner
from .presets import OWN, Stretch
from .routing import ContextPlan
from .sites import SITES, Site
from .student import Student

STEP = "dha_step"  # key in transformer_options under which a forward's Step travels to the blocks
WATCH = "dha_watch"  # key in transformer_options for one who wants to know what each call chose; see `Watch`
STATE = "dha_state"  # key in a block's extra_options under which our patches of one call talk to each other


# Called with the site, its plan, the grid's tokens (coarse,) and those (B, k) that its router chose, None where there
# are none, and the block's extra_options.
Watch = Callable[[Site, ContextPlan, Tensor | None, Tensor | None, dict], None]


class Patches(NamedTuple):
    """The five places where a student enters a UNet; `replace` is to be set at every block of `blocks`."""

    emb: Callable
    attn1: Callable
    replace: Callable
    output: Callable
    middle: Callable
    blocks: list[tuple[str, int]]

    def as_options(self) -> dict[str, Any]:
        """`transformer_options` for a bare UNet, without a model patcher."""
        patches = {
            "emb_patch": [self.emb],
            "attn1_patch": [self.attn1],
            "attn1_output_patch": [self.output],
            "middle_patch": [self.middle],
        }
        return {"patches": patches, "patches_replace": {"attn1": {block: self.replace for block in self.blocks}}}


class Step(NamedTuple):
    """What one UNet forward tells its blocks: time embedding (B, E), which blocks are ours, and how keys are spent.

    The phases (16,) of the grids are in the order of `SITES`.
    """

    emb: Tensor
    blocks: frozenset[tuple[str, int]]
    planner: Planner
    phases: Tensor | None


class Call(NamedTuple):
    """What one attention call needs to remember between its patches."""

    site: HybridSite | OfficialSite
    mixing: Mixing = Mixing()
    output: Tensor | None = None
    local: Tensor | None = None


def read_phase(options: dict) -> Tensor | None:
    """The grids' phase (1,) at the noise level that the host names; None where it names none."""
    levels = options.get("sigmas")
    return None if levels is None else find_phase(levels)


def make_patches(
    student: Student,
    attend: Callable,
    stretches: Sequence[Stretch] = (OWN,),
    levels: tuple[int, ...] | None = None,
    find_stretch: Callable[[dict], int | None] = lambda _options: 0,
    skip: frozenset[tuple[str, int]] = frozenset(),
    pays: Pays | None = None,
    phase_of: Callable[[dict], Tensor | None] = read_phase,
    attend_short: Callable | None = None,
) -> Patches:
    """Callables that run `student` inside a UNet.

    `attend(q, k, v, options, mask)` is the host's attention over (B, N, C), mask (B, 1, 1, m) added to logits or None;
    `attend_short` may be a faster one for short contexts, layers that are left as they are never see it.
    `find_stretch(options)`, asked once per forward, is the number of the stretch that it lies in, None to leave it as
    it is; `levels` are the student's own unless given. `phase_of(options)` moves the grids, see `dha.dither`. Blocks in
    `skip` are left alone, and so is, of mode `hybrid`, a layer where `pays(tokens, channels, keys)` is false.
    """
    attend_short = attend_short or attend
    chosen = student.config.levels if levels is None else levels
    planners = [Planner(student, stretch, pays) for stretch in stretches]
    sites = {site.block: site for site in student.list_sites() if site.level in chosen and site.block not in skip}
    numbers = {site.block: number for number, site in enumerate(SITES)}

    def emb_patch(emb: Tensor, _channels: int, options: dict) -> Tensor:
        options.pop(STEP, None)
        if (number := find_stretch(options)) is not None:
            phase = phase_of(options)
            phases = None if phase is None else list_phases(phase, len(SITES))
            options[STEP] = Step(emb, find_owned(options, sites, attn1_replace), planners[number], phases)
        return emb

    def attn1_patch(n: Tensor, context: Tensor, value: Tensor, options: dict):
        block, step = options.get("block"), options.get(STEP)
        options.pop(STATE, None)
        if step is None or block is None or block not in step.blocks:
            return n, context, value
        module, emb, planner = step.planner.student.site(sites[block]), step.emb, step.planner
        whole = is_whole(context, emb, options)
        if isinstance(module, OfficialSite):
            if not whole or n.shape != context.shape:
                raise refuse_parts(n, options)
            options[STATE] = Call(module, output=module(n, emb))
            return n, context[:, :1], value[:, :1]
        if not whole or value is not context:  # a hypernetwork's keys and values are not of the same tokens
            return n, context, value
        height, width = options["activations_shape"][-2:]
        number = numbers[block]
        phase = None if step.phases is None else step.phases[number : number + 1]
        prepared = planner.prepare(height, width, context, phase)
        if prepared is None:
            return n, context, value
        plan, places = prepared
        keys, values, mixing, chosen = module.build_context(context, emb, plan, places)
        if WATCH in options:
            options[WATCH](sites[block], plan, places.grid, chosen, options)
        local = None if module.local is None else module.local(context, emb, height, width)
        options[STATE] = Call(module, mixing, local=local)
        return module.correct("q", n), module.correct("k", keys), module.correct("v", values)

    def attn1_replace(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        call = options.get(STATE)
        if call is not None and call.output is not None:
            return q
        if call is None:
            return attend(q, k, v, options, None)
        # A later patch may have tiled the queries: every tile sees all keys, so that they are one picture's again.
        [out] = call.mixing.run(attend_short, q.reshape(len(k), -1, q.shape[-1]), k, v, options)
        out = out.reshape(q.shape)
        if call.mixing.marks is not None:
            release(k, v)
        return out

    def output_patch(out: Tensor, options: dict) -> Tensor:
        call = options.get(STATE)
        if call is None:
            return out
        if call.output is None:
            return call.site.correct("out", out)
        if call.output.shape != out.shape:
            raise refuse_parts(out, options)
        return call.output

    def middle_patch(x: Tensor, options: dict) -> Tensor:
        # Added where tokens are whole again, whatever ToMe and HyperTile did to the queries. Popped, or its tensors
        # would lie there while the feed-forward layer takes the most memory of the whole block.
        call = options.pop(STATE, None)
        return x if call is None or call.local is None else x + call.local

    return Patches(emb_patch, attn1_patch, attn1_replace, output_patch, middle_patch, list(sites))


def release(*tensors: Tensor) -> None:
    """Empty tensors that nobody reads any more: the host's block holds all keys and values on to its memory peak."""
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        for tensor in tensors:
            tensor.set_()


def find_owned(options: dict, blocks: Iterable[tuple[str, int]], replace: Callable) -> frozenset[tuple[str, int]]:
    """The blocks whose self-attention still is `replace`: other patches take some over, PAG for single forwards only.

    Those need all keys and values, so that ours must not shorten them.
    """
    replaced = options.get("patches_replace", {}).get("attn1", {})
    return frozenset(block for block in blocks if replaced.get((*block, 0), replaced.get(block)) is replace)


def is_whole(context: Tensor, emb: Tensor, options: dict) -> bool:
    """Whether the context still is one picture per time embedding: (B, H*W, C), not tiled or merged by others."""
    shape = options.get("activations_shape")
    return shape is not None and context.shape[0] == emb.shape[0] and context.shape[1] == shape[-2] * shape[-1]


def refuse_parts(found: Tensor, options: dict) -> RuntimeError:
    """What to raise where a student of mode `official` is given parts of a picture, which it was not trained for."""
    shape = options.get("activations_shape", [])
    return RuntimeError(
        f"Apply DHA: at {options.get('block')} another node tiled or merged the tokens, {tuple(found.shape)} of a "
        f"layer of {tuple(shape)}, expected all tokens of each picture; students of mode 'official' bring their own "
        "attention: bypass HyperTile or ToMe, or set their depth so that they leave the student's levels alone"
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, options: dict, mask: Tensor | None) -> Tensor:
    """`attend` for a bare UNet: PyTorch's fused attention over (B, N, C)."""
    q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
