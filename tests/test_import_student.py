"""A published student's checkpoint, made here under its full names, becomes our file and draws the same in ComfyUI."""

import copy
import shutil
import types

import pytest
import torch
from conftest import relate
from safetensors import safe_open
from safetensors.torch import load_file

from dha.checkpoint import StudentFileError, load_student
from dha.config import ConfigError, DHAConfig
from dha.official import OfficialSite
from dha.sites import SITES
from dha.student import Student
from dkd_trainer.import_student import import_student, read_arguments
from dkd_trainer.published import PublishedError

CONFIG = DHAConfig(mode="official", levels=(0, 1, 2, 3), norm_groups=4)
WIDTH = 32  # of the mini UNet's heads


@pytest.fixture(scope="module")
def published(teacher):
    """A published student's UNet weights under their full names, its decoder trained too, and its other parts."""
    generator = torch.Generator().manual_seed(3)
    state = {k: v for k, v in teacher.unet.state_dict().items() if ".attn1." not in k}
    for name in [name for name in state if name.startswith(("output_blocks.", "out."))]:
        shift = torch.randn(state[name].shape, generator=generator) * 0.05 * state[name].std().nan_to_num()
        state[name] = (state[name] + shift).half().float()
    student = Student(CONFIG, teacher.architecture, head_width=WIDTH)
    for weight in student.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    state |= {k: v.half().float() for k, v in student.named_weights().items()}
    tensors = {f"student_model.model.diffusion_model.{k}": v.clone() for k, v in state.items()}
    unused = "transformer_blocks.0.ff_EA.k"
    tensors |= {f"student_model.model.diffusion_model.input_blocks.{n}.1.{unused}": torch.ones(7) for n in (1, 2)}
    tensors["student_model.control_model.input_blocks.1.1.transformer_blocks.0.attn1.k"] = torch.ones(5)
    tensors["student_model.first_stage_model.decoder.conv_in.weight"] = torch.ones(3)
    tensors["student_model.cond_stage_model.model.positional_embedding"] = torch.ones(2)
    tensors["teacher_model.model.diffusion_model.out.0.weight"] = torch.ones(1)
    tensors["student_model.betas"] = torch.ones(1)
    return tensors


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="student.ckpt", **more):
        torch.save({"state_dict": tensors, "epoch": 3, "global_step": 150_000, **more}, tmp_path / name)
        return tmp_path / name

    return write


def run(checkpoint, out, *more):
    return import_student(read_arguments([str(checkpoint), "--out", str(out), "--head-width", str(WIDTH), *more]))


def load(studio, path):
    """The file through Load DHA Student."""
    folder = studio.base / "models" / "dha"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / path.name)
    return studio.call("LoadDHAStudent", student_name=path.name)


def predict_published(teacher, tensors, x, t, context):
    """The published student's forward, built without our patches: its weights and layers in a copy of the UNet."""
    unet = copy.deepcopy(teacher.unet)
    below = {k.removeprefix("student_model.model.diffusion_model."): v for k, v in tensors.items()}
    unet.load_state_dict({k: v for k, v in below.items() if k in unet.state_dict()}, strict=False)
    times = []
    unet.time_embed.register_forward_hook(lambda _module, _inputs, output: times.append(output))
    for site in SITES:
        unet.get_submodule(site.name.partition(".transformer_blocks.")[0]).norm.num_groups = CONFIG.norm_groups
        attention = unet.get_submodule(site.name)
        channels = teacher.architecture.channels[site.name]
        layer = OfficialSite(channels, teacher.architecture.embedding, channels // WIDTH, CONFIG.sparsity)
        own = {k.removeprefix(f"{site.name}."): v for k, v in below.items() if k.startswith(f"{site.name}.")}
        layer.load_state_dict(own)
        attention.forward = types.MethodType(lambda _self, n, layer=layer, **_: layer(n, times[-1]), attention)
    with torch.no_grad():
        return unet(x, t, context=context, transformer_options={})


def predict_in_host(model, x, t, context):
    """The UNet of a model patcher as ComfyUI has it while it samples."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    with torch.no_grad():
        options = dict(model.model_options["transformer_options"])
        return model.model.diffusion_model(x, t, context=context, transformer_options=options)


def test_the_imported_student_with_its_trunk_predicts_what_the_published_one_does(
    studio, teacher, published, write, tmp_path
):
    import comfy.sd
    import comfy.utils

    out = tmp_path / "imported.safetensors"
    lines = run(write(published), out, "--base", str(studio.checkpoint))
    assert any("imported-trunk.safetensors" in line for line in lines)
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([700.0, 100.0])
    context = teacher.encode_prompts(["octopus"]).repeat(2, 1, 1)
    expected = predict_published(teacher, published, x, t, context)
    trunk = comfy.utils.load_torch_file(str(tmp_path / "imported-trunk.safetensors"))
    model, _ = comfy.sd.load_lora_for_models(studio.model, None, trunk, 1.0, 0.0)
    untouched = predict_in_host(studio.model, x, t, context)
    loaded = load(studio, out)
    assert relate(predict_in_host(studio.apply(model, loaded), x, t, context), expected) < 1e-4
    without_trunk = predict_in_host(studio.apply(studio.model, loaded), x, t, context)
    assert relate(without_trunk, expected) > 1e-2
    assert torch.equal(predict_in_host(studio.model, x, t, context), untouched)


def test_norm_groups_are_those_of_the_published_student_only_while_it_runs(studio, teacher, published, write, tmp_path):
    out = tmp_path / "imported.safetensors"
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500.0])
    context = teacher.encode_prompts(["octopus"])
    found = {}
    for groups in ("4", "32"):
        run(write(published), out, "--without-trunk", "--norm-groups", groups)
        patched = studio.apply(studio.model, load(studio, out))
        found[groups] = predict_in_host(patched, x, t, context)
        numbers = {patched.model.diffusion_model.get_submodule(f"input_blocks.{n}.1.norm").num_groups for n in (1, 8)}
        assert numbers == {int(groups)}
    assert relate(found["4"], found["32"]) > 1e-3
    predict_in_host(studio.model, x, t, context)
    assert studio.model.model.diffusion_model.get_submodule("input_blocks.1.1.norm").num_groups == 32


def test_a_window_of_the_sampling_is_refused_where_the_norms_differ(studio, published, write, tmp_path):
    run(write(published), tmp_path / "imported.safetensors", "--without-trunk")
    loaded = load(studio, tmp_path / "imported.safetensors")
    with pytest.raises(ValueError, match="start_percent to 0"):
        studio.apply(studio.model, loaded, start=0.2)


def test_what_a_student_does_without_is_counted_and_left_out(published, write, tmp_path):
    out = tmp_path / "imported.safetensors"
    lines = run(write(published), out, "--without-trunk")
    left = [line.removeprefix("left out: ").partition(",")[0] for line in lines if line.startswith("left out: ")]
    assert {"unused ff_EA", "control branch", "VAE", "text encoder", "teacher", "others"} <= set(left)
    assert any("unused ff_EA, 2 tensors" in line for line in lines)
    with safe_open(out, "pt") as file:
        assert {name.partition(".attn1.")[0] for name in file.keys()} == {  # noqa: SIM118
            site.name.removesuffix(".attn1") for site in SITES
        }
    student = load_student(out)
    assert (student.config, student.head_width) == (CONFIG, WIDTH)


def test_only_what_differs_from_the_base_is_written(studio, teacher, published, write, tmp_path):
    run(write(published), tmp_path / "a.safetensors", "--base", str(studio.checkpoint))
    names = list(load_file(tmp_path / "a-trunk.safetensors"))
    assert names and all(name.startswith(("diffusion_model.output_blocks.", "diffusion_model.out.")) for name in names)
    frozen = {f"student_model.model.diffusion_model.{k}": v for k, v in teacher.unet.state_dict().items()}
    same = {name: frozen.get(name, tensor) for name, tensor in published.items()}
    lines = run(write(same), tmp_path / "b.safetensors", "--base", str(studio.checkpoint))
    assert not (tmp_path / "b-trunk.safetensors").exists() and "nothing else is needed" in lines[-1]


def test_the_trained_decoder_is_never_dropped_silently(published, write, tmp_path):
    with pytest.raises(SystemExit):
        run(write(published), tmp_path / "a.safetensors")


class Hostile:
    """Something a pickle could run."""

    def __reduce__(self):
        return (print, ("run by a pickle",))


def spoil(tensors, how):
    site = f"student_model.model.diffusion_model.{SITES[3].name}"
    spoilt = dict(tensors)
    if how == "missing":
        del spoilt[f"{site}.global_alpha"]
    elif how == "surplus":
        spoilt[f"{site}.extra.weight"] = torch.ones(2)
    elif how == "misshapen":
        spoilt[f"{site}.ea_attn.k"] = torch.ones(3, 3)
    elif how == "not finite in fp16":
        spoilt[f"{site}.ea_attn.k"] = spoilt[f"{site}.ea_attn.k"] * float("nan")
    elif how == "not a published DHA student":
        spoilt = {k: v for k, v in spoilt.items() if "attn1" not in k}
    return spoilt


@pytest.mark.parametrize(
    "how", ["missing", "surplus", "misshapen", "not finite in fp16", "not a published DHA student"]
)
def test_a_checkpoint_that_is_no_whole_student_is_one_clear_error(published, write, tmp_path, how):
    with pytest.raises((PublishedError, StudentFileError), match=how):
        run(write(spoil(published, how)), tmp_path / "a.safetensors", "--without-trunk")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_checkpoint_that_would_run_code_is_refused(published, write, tmp_path, capsys):
    path = write(published, callbacks=Hostile())
    with pytest.raises(PublishedError, match="state_dict alone"):
        run(path, tmp_path / "a.safetensors", "--without-trunk")
    assert "run by a pickle" not in capsys.readouterr().out


def test_a_cut_off_checkpoint_is_refused(published, write, tmp_path):
    path = write(published)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(PublishedError, match="student.ckpt"):
        run(path, tmp_path / "a.safetensors", "--without-trunk")


def test_a_base_of_another_trunk_is_refused(studio, published, write, tmp_path):
    name = "student_model.model.diffusion_model.out.2.weight"
    other = {**published, name: torch.ones(1, 2, 3, 3)}
    with pytest.raises(PublishedError, match="1 of another shape"):
        run(write(other), tmp_path / "a.safetensors", "--base", str(studio.checkpoint))


def test_norm_groups_belong_to_mode_official():
    with pytest.raises(ConfigError, match="norm_groups"):
        DHAConfig(norm_groups=4)
    with pytest.raises(ConfigError, match="norm_groups"):
        DHAConfig(mode="official", norm_groups=3)
