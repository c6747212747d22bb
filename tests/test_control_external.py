"""A published student's control branch, of external attention only: converted, and run as it was published."""

import copy
import types

import pytest
import torch
from conftest import make_student, relate
from control_files import draw_source, draw_weights, predict, steer
from safetensors import safe_open
from test_control import SHAPE
from test_official import read_case

from dha.control import PREFIX, FCNet, apply_pairs
from dha.control_file import ENCODER_SITES, ControlConfig, ControlFileError, load_control, read_published
from dha.frequency import filter_band
from dha.official import ExternalAttention
from dha.patch import make_patches, plain_attention

STUDENT, UNET = "student_model.", "model.diffusion_model."
HEAD_WIDTH, GROUPS = 32, 4  # of the mini UNet's heads, and of published students' norms


def write_published(unet, path, layer="attn1.", spoil=None):
    """A Lightning checkpoint of a student with a branch for this UNet; the branch's tensors under the plain names."""
    generator = torch.Generator().manual_seed(5)
    weights = {name: tensor for name, tensor in draw_weights(unet, 0).items() if ".attn1." not in name}
    for site in ENCODER_SITES:
        channels = unet.get_submodule(site.name).to_q.in_features
        with torch.device("meta"):
            parts = ExternalAttention(channels, channels // HEAD_WIDTH, HEAD_WIDTH).state_dict()
        for part, like in parts.items():
            scale = channels ** (0.5 if part == "v" else 0)  # an average over the tokens is small: it is to be seen
            weights[f"{site.name}.{part}"] = torch.randn(like.shape, generator=generator).half().float() * scale
    weights = {name: tensor.half().float() for name, tensor in weights.items()}
    tensors = {STUDENT + PREFIX + name.replace("attn1.", layer): tensor for name, tensor in weights.items()}
    trunk = {name: tensor for name, tensor in unet.state_dict().items() if ".attn1." not in name}
    tensors |= {f"{STUDENT}{UNET}{name}": tensor for name, tensor in trunk.items()}
    tensors[f"{STUDENT}{UNET}{ENCODER_SITES[0].name}.global_alpha"] = torch.tensor(0.1)
    tensors[f"{STUDENT}{PREFIX}input_blocks.1.1.transformer_blocks.0.ff_EA.k"] = torch.ones(7)
    tensors[f"teacher_model.{PREFIX}input_blocks.0.0.weight"] = torch.ones(3)
    if spoil is not None:
        spoil(tensors)
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 150_000}, path)
    return weights


def convert(checkpoint, out, *more):
    from dkd_trainer.control.command import main

    main(["convert", str(checkpoint), "--band", "low", "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def unet(studio):
    return studio.model.model.diffusion_model


@pytest.fixture(scope="module")
def published(unet, tmp_path_factory):
    """A checkpoint and its branch's tensors."""
    path = tmp_path_factory.mktemp("published") / "student.ckpt"
    return path, write_published(unet, path)


@pytest.fixture(scope="module")
def converted(studio, published):
    return convert(published[0], studio.base / "models" / "dha_control" / "student.safetensors")


@pytest.fixture(scope="module")
def control(studio, converted):
    return studio.call("DHALoadFrequencyControl", control_name=converted.name)


@pytest.fixture(scope="module")
def reference(unet, published):
    """The published branch, built without ours: each self-attention's forward is the published layer's."""
    branch = FCNet(copy.deepcopy(unet)).eval()
    missing, surplus = branch.load_state_dict(published[1], strict=False)
    assert all(".attn1." in name for name in (*missing, *surplus))
    for site in ENCODER_SITES:
        branch.get_submodule(site.name.partition(".transformer_blocks.")[0]).norm.num_groups = GROUPS
        attention = branch.get_submodule(site.name)
        channels = attention.to_q.in_features
        layer = ExternalAttention(channels, channels // HEAD_WIDTH, HEAD_WIDTH)
        below = f"{site.name}."
        layer.load_state_dict({n.removeprefix(below): t for n, t in published[1].items() if n.startswith(below)})
        attention.forward = types.MethodType(lambda _self, n, layer=layer, **_: layer(n), attention)
    return branch


def test_the_layer_in_a_block_of_the_branch_adds_what_the_published_one_gives(host):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    tensors, weights, settings = read_case("ea0")
    shape = {**SHAPE, "model_channels": 64, "num_head_channels": int(settings["M"])}
    branch = FCNet(UNetModel(**shape), attention="external").eval()
    block = branch.middle_block[1].transformer_blocks[0]
    for parameter in block.parameters():  # ComfyUI leaves them as the memory happens to be
        torch.nn.init.normal_(parameter, std=0.05)
    block.attn1.load_state_dict(weights)
    assert (block.attn1.heads, block.attn1.slots) == (int(settings["num_heads"]), int(settings["M"]))
    block.norm1 = torch.nn.Identity()  # the published layer's input is what this norm gives
    for silenced in (block.attn2.to_out[0], block.ff.net[2]):
        torch.nn.init.zeros_(silenced.weight)
        torch.nn.init.zeros_(silenced.bias)
    with torch.no_grad():
        added = block(tensors["x"], context=torch.randn(2, 7, SHAPE["context_dim"])) - tensors["x"]
    torch.testing.assert_close(added, tensors["y"], atol=1e-5, rtol=0)


def test_a_student_becomes_a_control_file_with_the_tensors_that_it_runs(published, converted, capsys):
    found = load_control(converted)
    assert found.config == ControlConfig("low", 0, "external", GROUPS) and found.teacher == "unknown"
    assert found.weights.keys() == published[1].keys()
    assert all(torch.equal(tensor, published[1][name].half()) for name, tensor in found.weights.items())
    other = convert(published[0], converted.with_name("other.safetensors"), "--norm-groups", "32")
    assert load_control(other).config.norm_groups == 32
    assert "external attention, norms of 32 groups" in capsys.readouterr().out


def test_names_of_a_whole_dha_layer_are_read_as_the_same(unet, converted, tmp_path):
    write_published(unet, tmp_path / "student.ckpt", layer="attn1.ea_attn.")
    found, expected = read_published(tmp_path / "student.ckpt", "low"), load_control(converted)
    assert found.config == expected.config and found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tensor.half(), expected.weights[name]) for name, tensor in found.weights.items())


def test_the_host_computes_what_was_published(studio, unet, control, reference):
    source, x, context = draw_source(2, (136, 88)), draw_source(2, (136, 88), seed=1), torch.randn(2, 77, 128)
    found = predict(steer(studio, control, source, strength=0.6), x, context)
    with torch.inference_mode():
        sampling = studio.model.get_model_object("model_sampling")
        sigma = torch.full((2,), 2.0)
        noisy, t = sampling.calculate_input(sigma, x), sampling.timestep(sigma).float()
        hint = reference.embed_hint(filter_band(studio.model.model.process_latent_in(source), "low"))
        pairs = [pair.scale(0.6) for pair in reference(noisy, hint, t, context, {})]
        options = apply_pairs({}, pairs)
        expected = sampling.calculate_denoised(sigma, unet(noisy, t, context, transformer_options=options), x)
    assert relate(predict(studio.model, x, context), expected) > 1e-3
    assert relate(found, expected) < 1e-5


@pytest.mark.parametrize("ignored", ["external attention", "its norms' groups"])
def test_both_differences_from_a_teachers_branch_are_felt(studio, control, reference, ignored):
    branch = copy.deepcopy(control.build_for(studio.model).model)
    x, t, context = draw_source(), torch.tensor([500.0]), torch.randn(1, 77, 128)
    with torch.no_grad():
        whole = branch(x, branch.embed_hint(x), t, context, {})
        for module in branch.modules():
            if ignored == "external attention" and hasattr(module, "attn1"):
                module.attn1.v.zero_()
            elif ignored != "external attention" and hasattr(module, "transformer_blocks"):
                module.norm.num_groups = 32
        spoilt = branch(x, branch.embed_hint(x), t, context, {})
    assert relate(spoilt[-1].add, whole[-1].add) > 1e-2


def test_it_draws_something_else_and_leaves_no_trace(studio, control):
    before = studio.draw()
    steered = studio.draw(steer(studio, control, draw_source()))
    assert 1e-3 < relate(steered, before) < 5, "the control is not seen, or not sane"
    assert torch.equal(studio.draw(), before)


def test_the_models_dha_stays_out_of_it(studio, student, control):
    dha, source = studio.apply(student=student), {"samples": draw_source()}
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "shuffle_seed": 0}
    models = [
        studio.call("DHAApplyFrequencyControl", model=dha, control=control, source=source, **settings, accelerate=on)
        for on in (True, False)
    ]
    assert torch.equal(*map(studio.draw, models))


def test_the_trainers_bare_use_is_the_published_one_too(teacher, converted, reference):
    from dkd_trainer.control.steering import FrozenBranch

    x, t, context = draw_source(2), torch.tensor([700.0, 100.0]), torch.randn(2, 77, 128)
    branch = FrozenBranch(converted.name, load_control(converted), teacher)
    inner = make_patches(make_student(teacher.architecture), plain_attention).as_options()
    with torch.inference_mode():
        pairs = reference(x, reference.embed_hint(filter_band(x, "low")), t, context, {})
        expected = teacher.predict(x, t, context, apply_pairs({}, pairs))
        found = teacher.predict(x, t, context, branch.as_options(teacher, x))
        assert relate(found, expected) < 1e-5 < relate(teacher.predict(x, t, context), expected)
        assert torch.equal(teacher.predict(x, t, context, branch.as_options(teacher, x, inner=inner)), found)


SITE = f"{STUDENT}{PREFIX}{ENCODER_SITES[3].name}"
BLOCK = f"{STUDENT}{PREFIX}input_blocks.4.0.in_layers.2.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop(f"{SITE}.v"), ["1 tensors missing", f"{ENCODER_SITES[3].name}.v"]),
        (lambda t: t.pop(f"{SITE}.k"), ["not FCDiffusion's on SD-2.x", f"{ENCODER_SITES[3].name}.k"]),
        (lambda t: t.pop(BLOCK), ["1 tensors missing", "input_blocks.4.0.in_layers.2.weight"]),
        (lambda t: t.update({f"{SITE}.q": torch.ones(2)}), ["1 surplus", f"{ENCODER_SITES[3].name}.q"]),
        (lambda t: t.update({f"{SITE}.ea_attn.v": t[f"{SITE}.v"]}), ["1 surplus", "attn1.ea_attn.v"]),
        (lambda t: t.update({f"{SITE}.v": torch.ones(3, 3)}), [".v has shape (3, 3), expected ("]),
        (lambda t: t.update({f"{SITE}.k": torch.ones(3)}), ["not FCDiffusion's on SD-2.x"]),
        (lambda t: t[f"{SITE}.k"].fill_(float("nan")), [".k holds values that are not finite"]),
        (lambda t: t.update({BLOCK: torch.ones(2)}), ["in_layers.2.weight has shape (2,)"]),
    ],
    ids=["v gone", "k gone", "layer gone", "q", "both names", "misshapen", "flat", "not finite", "misshapen layer"],
)
def test_a_damaged_student_is_refused_by_the_tensors_name(unet, tmp_path, spoil, words):
    path = tmp_path / "damaged.ckpt"
    write_published(unet, path, spoil=spoil)
    with pytest.raises(ControlFileError, match="damaged.ckpt") as caught:
        read_published(path, "low")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("groups", [0, 3])
def test_norms_of_an_impossible_number_of_groups_are_refused(published, groups):
    with pytest.raises(ValueError, match=f"norm_groups {groups}, expected a power of 2"):
        read_published(published[0], "low", groups)


def test_a_connecting_layer_that_is_gone_is_refused_when_the_model_is_known(studio, unet, tmp_path):
    write_published(unet, tmp_path / "student.ckpt", spoil=lambda t: t.pop(f"{STUDENT}{PREFIX}zero_convs_add.3.0.bias"))
    path = convert(tmp_path / "student.ckpt", studio.base / "models" / "dha_control" / "gone.safetensors")
    loaded = studio.call("DHALoadFrequencyControl", control_name=path.name)
    with pytest.raises(ValueError, match="gone.safetensors.* 1 tensors missing.*zero_convs_add.3.0.bias"):
        steer(studio, loaded, draw_source())


@pytest.mark.parametrize("band", ["mini", "low", "mid", "high"])
def test_a_shipped_control_has_self_attention_and_is_read_to_the_bit(band):
    from conftest import ROOT

    path = ROOT / "workflows" / "models" / "dha_control" / f"mini-sd21-{band}.safetensors"
    loaded = load_control(path)
    with safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(PREFIX + name), tensor) for name, tensor in loaded.weights.items())
    assert loaded.config == ControlConfig(band, loaded.config.rank, "self", 32)
