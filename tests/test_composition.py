"""Apply DHA together with what people use beside it, before and after it in the graph, in a real ComfyUI."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TRAINED, relate
from safetensors.torch import save_file

from dha.config import DHAConfig
from dha.sites import SITES

PEERS = {
    "LoRA": ("LoraLoaderModelOnly", {"lora_name": "random.safetensors", "strength_model": 1.0}),
    "HyperTile": ("HyperTile", {"tile_size": 64, "swap_size": 1, "max_depth": 0, "scale_depth": False}),
    "ToMe": ("TomePatchModel", {"ratio": 0.5}),
    "FreeU": ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    "PAG": ("PerturbedAttentionGuidance", {"scale": 3.0}),
    "SAG": ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
}
ORDERS = ("peer first", "DHA first")
GUIDANCE = ("PAG", "SAG")  # both work on the middle block's self-attention


@pytest.fixture(scope="module", autouse=True)
def lora(studio) -> Path:
    """A LoRA of rank 4 on queries, keys, values and outputs of self- and cross-attention, in kohya's names."""
    generator, state = torch.Generator().manual_seed(3), {}
    weights = studio.model.model.diffusion_model.state_dict()
    for site in SITES:
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                name = f"{site.name.removesuffix('attn1')}{attention}.{part}"
                rows, columns = weights[f"{name}.weight"].shape
                key = "lora_unet_" + diffusers_name(name).replace(".", "_")
                state[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
                state[f"{key}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
                state[f"{key}.alpha"] = torch.tensor(4.0)
    path = studio.base / "models" / "loras" / "random.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def diffusers_name(name: str) -> str:
    """`input_blocks.1.1.x` -> `down_blocks.0.attentions.0.x`, as LoRA trainers name SD's layers."""
    kind, number, _, rest = name.split(".", 3)
    if kind == "middle_block":
        return f"mid_block.attentions.0.{name.split('.', 2)[2]}"
    if kind == "input_blocks":
        return f"down_blocks.{(int(number) - 1) // 3}.attentions.{(int(number) - 1) % 3}.{rest}"
    return f"up_blocks.{int(number) // 3}.attentions.{int(number) % 3}.{rest}"


@pytest.fixture(scope="module")
def control(studio):
    """A ControlNet of random weights that belongs to the mini model, through ComfyUI's own loader."""
    from comfy.cldm.cldm import ControlNet

    config = {**studio.model.model.model_config.unet_config, "hint_channels": 3, "dtype": torch.float32}
    config.pop("out_channels", None)
    net, generator = ControlNet(**config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(0.0)
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                module.weight.fill_(1.0)
    path = studio.base / "models" / "controlnet" / "random.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return studio.call("ControlNetLoader", control_net_name=path.name)


def patch(studio, peer: str, model=None):
    """The model after a peer's node."""
    node_id, settings = PEERS[peer]
    return studio.call(node_id, model=model or studio.model, **settings)


def combine(studio, peer: str, order: str, **ours):
    """The model after a peer's node and ours in the given order."""
    if order == "peer first":
        return studio.apply(patch(studio, peer), **ours)
    return patch(studio, peer, studio.apply(**ours))


@pytest.fixture(scope="module")
def alone(studio, undisturbed):
    """Pictures with each peer and no DHA, drawn once."""
    drawn = {}

    def draw(peer: str) -> torch.Tensor:
        if peer not in drawn:
            drawn[peer] = studio.draw(patch(studio, peer))
            assert relate(drawn[peer], undisturbed) > 1e-5, f"{peer} does nothing; this test would prove nothing"
        return drawn[peer]

    return draw


@pytest.fixture(scope="module")
def ours(studio, student):
    return studio.draw(studio.apply(student=student))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("peer", PEERS)
def test_every_token_with_a_peer_is_the_peer(studio, student, alone, peer, order):
    drawn = studio.draw(combine(studio, peer, order, student=student, budget=1.0))
    assert relate(drawn, alone(peer)) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("peer", PEERS)
def test_both_take_effect(studio, student, undisturbed, alone, ours, peer, order):
    drawn = studio.draw(combine(studio, peer, order, student=student))
    assert relate(drawn, alone(peer)) > 1e-4, "DHA is not seen"
    if peer != "HyperTile":  # its tiles see all of our keys: see below
        assert relate(drawn, ours) > 1e-5, f"{peer} is not seen"
    assert torch.equal(studio.draw(), undisturbed)


@pytest.mark.parametrize("peer", ["LoRA", "FreeU", "PAG", "SAG"])
def test_order_does_not_matter(studio, student, peer):
    first, second = (studio.draw(combine(studio, peer, order, student=student)) for order in ORDERS)
    assert relate(first, second) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("landmarks", "most"), [(0, 1e-5), (16, 0.1)])
def test_hypertile_tiles_see_all_keys(studio, order, landmarks, most):
    """Tiling the queries of a short context changes nothing: every tile has every key, with its weight.

    But that other queries are landmarks: they are every so-many-th in the order in which tiles come.
    """
    student = studio.load_student("tiled", config=replace(TRAINED, landmarks=landmarks))
    for batch in (1, 3):
        tiled = studio.draw(combine(studio, "HyperTile", order, student=student), batch=batch)
        assert relate(tiled, studio.draw(studio.apply(student=student), batch=batch)) < most


@pytest.mark.parametrize("order", ORDERS)
def test_tome_merges_queries_only(studio, order):
    """The context comes from all tokens, whether ToMe merges the queries before or after it is built."""
    drawn = [studio.draw(combine(studio, "ToMe", each, levels="finest")) for each in ORDERS]
    assert relate(*drawn) < 1e-5
    settings = {"model": studio.model, "ratio": 0.0}
    unmerged = studio.call("TomePatchModel", **settings)
    assert relate(studio.draw(studio.apply(unmerged)), studio.draw(studio.apply())) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("peer", GUIDANCE)
def test_blocks_of_other_nodes_stay_theirs(studio, alone, peer, order):
    """With our hands on every level, the middle block's attention is whole wherever a guidance node reads it."""
    # at half of the tokens the middle block has two keys of four: a single one would broadcast, and hide the fault
    drawn = studio.draw(combine(studio, peer, order, levels="all", budget=0.5))
    assert relate(drawn, alone(peer)) > 1e-4
    if peer == "SAG":
        assert torch.equal(drawn, studio.draw(combine(studio, peer, order, levels="three finest", budget=0.5)))
    else:
        assert relate(drawn, studio.draw(combine(studio, peer, "peer first", levels="all", budget=0.5))) < 1e-5


def test_owned_blocks_are_named(studio, caplog):
    studio.apply(patch(studio, "SAG"), levels="all")
    assert "another node owns the self-attention of [('middle', 0)]" in caplog.text
    caplog.clear()
    studio.apply(patch(studio, "SAG"), levels="finest")
    assert not caplog.text


@pytest.mark.parametrize("size", [(136, 88), (64, 256)], ids=["odd", "tall"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("peer", ["HyperTile", "ToMe", "FreeU"])
def test_peers_at_other_sizes(studio, student, peer, order, size):
    drawn = studio.draw(combine(studio, peer, order, student=student), size=size, batch=2)
    assert relate(drawn, studio.draw(size=size, batch=2)) > 1e-4


def test_all_peers_at_once(studio, student):
    model = studio.model
    for peer in ("LoRA", "HyperTile", "FreeU"):
        model = patch(studio, peer, model)
    model = studio.apply(model, student=student)
    for peer in ("ToMe", "PAG"):
        model = patch(studio, peer, model)
    assert relate(studio.draw(model, batch=2), studio.draw(batch=2)) > 1e-4


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_controlnet(studio, student, control, cfg):
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(5))
    conditions = {"positive": studio.positive, "negative": studio.negative, "control_net": control, "image": hint}
    positive, negative = studio.host.call(
        "ControlNetApplyAdvanced", **conditions, strength=0.8, start_percent=0.0, end_percent=1.0
    )
    settings = {"positive": positive, "negative": negative, "cfg": cfg, "batch": 2}
    exact, drawn = studio.draw(**settings), studio.draw(studio.apply(student=student), **settings)
    assert relate(exact, studio.draw(cfg=cfg, batch=2)) > 1e-4, "the ControlNet does nothing"
    assert relate(drawn, exact) > 1e-4, "DHA is not seen"
    assert relate(drawn, studio.draw(studio.apply(student=student), cfg=cfg, batch=2)) > 1e-4, (
        "the ControlNet is not seen"
    )
    assert relate(studio.draw(studio.apply(student=student, budget=1.0), **settings), exact) < 1e-5


def test_published_students_leave_levels_to_peers(studio, undisturbed):
    """HyperTile at the finest level alone, the student at the next: the order does not matter."""
    published = studio.load_student("published", config=DHAConfig(mode="official", levels=(1,), norm_groups=4))
    alone = studio.draw(studio.apply(student=published))
    assert relate(alone, undisturbed) > 1e-4
    first, second = (studio.draw(combine(studio, "HyperTile", order, student=published)) for order in ORDERS)
    assert relate(first, second) < 1e-5 and relate(first, alone) > 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_published_students_refuse_parts_of_a_picture(studio, undisturbed, order):
    """They compute a layer's output from all of its tokens, and the model has their norms: neither can be left out."""
    published = studio.load_student("published", config=DHAConfig(mode="official", levels=(1,), norm_groups=4))
    tiles = {"tile_size": 32, "swap_size": 1, "max_depth": 1, "scale_depth": False}
    if order == "peer first":
        model = studio.apply(studio.call("HyperTile", model=studio.model, **tiles), student=published)
    else:
        model = studio.call("HyperTile", model=studio.apply(student=published), **tiles)
    with pytest.raises(RuntimeError, match="tiled or merged the tokens.*bypass HyperTile or ToMe"):
        studio.draw(model)
    assert torch.equal(studio.draw(), undisturbed)


def test_layers_whose_values_are_not_of_their_keys_tokens_stay_as_they_are(studio):
    """A hypernetwork in front of Apply DHA changes keys and values each in its own way; behind it, short ones."""

    def stretch(n, context, value, _options):
        return n, 1.3 * context, 0.7 * value

    def add(model):
        patched = model.clone()
        patched.set_model_attn1_patch(stretch)
        return patched

    alone = studio.draw(add(studio.model))
    assert torch.equal(studio.draw(studio.apply(add(studio.model))), alone)
    behind = studio.draw(add(studio.apply()))
    assert not torch.equal(behind, alone) and not torch.equal(behind, studio.draw(studio.apply()))
