"""Apply DHA in a real ComfyUI: what it changes, what it leaves alone, and what memory management sees of it."""

import copy
import dataclasses
import gc
import hashlib
import sys
import weakref

import pytest
import torch
from conftest import ROOT, TRAINED, relate
from torch._dynamo.testing import CompileCounter

from dha.checkpoint import load_student
from dha.patch import make_patches, plain_attention
from dha.presets import Stretch

LATENT_SIZES = {"square": (128, 128), "wide": (192, 128), "odd": (136, 88), "tall": (64, 256)}


def hash_weights(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def record_steps(studio, model, **settings) -> list[torch.Tensor]:
    """The denoised latents of every sampling step."""
    steps, model = [], model.clone()

    def keep(arguments):
        steps.append(arguments["denoised"].clone())
        return arguments["denoised"]

    model.set_model_sampler_post_cfg_function(keep)
    studio.draw(model, **settings)
    return steps


def find_loaded(module) -> list:
    """ComfyUI's entries for a module among the models it holds in memory."""
    import comfy.model_management

    return [m for m in comfy.model_management.current_loaded_models if m.model is not None and m.model.model is module]


@pytest.mark.parametrize(
    "settings", [{"budget": 0.0}, {"start": 1.0}, {"start": 0.5, "end": 0.5}, {"start": 0.7, "end": 0.2}]
)
def test_nothing_asked_is_the_same_model(studio, student, settings):
    assert studio.apply(student=student, **settings) is studio.model


@pytest.mark.parametrize("trained", [False, True], ids=["training-free", "student"])
def test_leaves_no_trace(studio, student, undisturbed, trained):
    options, weights = copy.deepcopy(studio.model.model_options), hash_weights(studio.model)
    patched = studio.apply(student=student if trained else None)
    drawn = studio.draw(patched)
    assert 1e-4 < relate(drawn, undisturbed) < 5, "the student is not seen, or not sane"
    assert studio.model.model_options == options
    assert not studio.model.patches and not studio.model.object_patches and not studio.model.additional_models
    assert hash_weights(studio.model) == weights
    assert torch.equal(studio.draw(), undisturbed)
    assert torch.equal(studio.draw(patched), drawn), "the same seed gives another picture"
    del patched
    assert torch.equal(studio.draw(), undisturbed)


def test_student_differs_from_training_free(studio, student):
    assert relate(studio.draw(studio.apply(student=student)), studio.draw(studio.apply(levels="two finest"))) > 1e-4


@pytest.mark.parametrize("levels", ["auto", "finest", "two finest", "three finest", "all"])
def test_levels(studio, undisturbed, levels):
    drawn = studio.draw(studio.apply(levels=levels))
    assert 1e-4 < relate(drawn, undisturbed) < 5
    if levels == "auto":
        assert torch.equal(drawn, studio.draw(studio.apply(levels="two finest")))


def test_more_tokens_are_closer(studio, undisturbed):
    drawn = [studio.draw(studio.apply(levels="all", budget=budget)) for budget in (0.1, 0.5, 1.0)]
    errors = [relate(picture, undisturbed) for picture in drawn]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5, "every token is a key: this is plain attention"


def test_every_token_with_a_student_is_the_teacher(studio, student, undisturbed):
    assert relate(studio.draw(studio.apply(student=student, budget=1.0)), undisturbed) < 1e-5


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.0), (0.0, 0.5)])
def test_percent_window(studio, student, start, end):
    patched = studio.apply(student=student, start=start, end=end)
    exact, ours = (record_steps(studio, model, steps=4) for model in (studio.model, patched))
    if start:
        assert all(torch.equal(a, b) for a, b in zip(exact[:2], ours[:2], strict=True))
        assert relate(ours[2], exact[2]) > 1e-5
    else:
        assert relate(ours[0], exact[0]) > 1e-5
        whole = record_steps(studio, studio.apply(student=student), steps=4)
        assert all(torch.equal(a, b) for a, b in zip(whole[:2], ours[:2], strict=True))
        assert relate(ours[3], whole[3]) > 1e-5


@pytest.mark.parametrize("size", LATENT_SIZES.values(), ids=list(LATENT_SIZES))
def test_sizes(studio, student, size):
    drawn = studio.draw(studio.apply(student=student), size=size)
    assert drawn.shape == (1, 4, size[1] // 8, size[0] // 8)
    assert 1e-4 < relate(drawn, studio.draw(size=size)) < 5


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_batch(studio, student, cfg):
    """Pictures of a batch do not see each other, nor do the two halves of guidance."""
    patched = studio.apply(student=student)
    batch = studio.draw(patched, batch=3, cfg=cfg)
    assert relate(batch, studio.draw(batch=3, cfg=cfg)) > 1e-4
    noise = {"samples": torch.zeros(1, 4, 16, 16)}
    alone = [studio.draw(patched, latent={**noise, "batch_index": [n]}, cfg=cfg) for n in range(3)]
    assert relate(batch, torch.cat(alone)) < 1e-4


def test_guidance_goes_the_right_way(studio, student):
    """Prompt and negative prompt are told apart: guidance scale 1 is the prompt alone, 0 the negative prompt alone."""
    patched = studio.apply(student=student)
    swapped = {"positive": studio.negative, "negative": studio.positive}
    assert relate(studio.draw(patched, cfg=0.0), studio.draw(patched, cfg=1.0, **swapped)) < 1e-4
    assert relate(studio.draw(patched, cfg=5.0), studio.draw(patched, cfg=5.0, **swapped)) > 1e-3


def test_image_to_image(studio, student):
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
    patched = studio.apply(student=student)
    drawn = studio.draw(patched, latent=latent, denoise=0.5)
    assert relate(drawn, studio.draw(latent=latent, denoise=0.5)) > 1e-5


def test_inpainting(studio, student):
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    latent = studio.call("SetLatentNoiseMask", samples=latent, mask=mask)
    drawn = studio.draw(studio.apply(student=student), latent=latent)
    assert relate(drawn[..., :7], latent["samples"][..., :7]) < 1e-4, "outside the mask nothing changes"
    assert relate(drawn[..., 9:], studio.draw(latent=latent)[..., 9:]) > 1e-5


def test_two_students_in_one_workflow(studio, student):
    other = studio.load_student("second", seed=1)
    first, second = (studio.apply(student=s) for s in (student, other))
    drawn = studio.draw(first), studio.draw(second)
    assert relate(*drawn) > 1e-4
    assert torch.equal(studio.draw(first), drawn[0]) and torch.equal(studio.draw(second), drawn[1])


def test_clone_shares_weights(studio, student):
    patched = studio.apply(student=student)
    cloned = patched.clone()
    assert patched.model is studio.model.model and cloned.model is studio.model.model
    (inner,) = cloned.get_additional_models()
    assert inner.model is student.patcher.model
    assert torch.equal(studio.draw(cloned), studio.draw(patched))


def test_memory_is_counted_and_freed(studio):
    import comfy.model_management

    loaded = studio.load_student("passing", seed=2)
    module, size = weakref.ref(loaded.patcher.model), loaded.patcher.model_size()
    assert size == sum(p.numel() * p.element_size() for p in loaded.patcher.model.parameters()) > 0
    patched = studio.apply(student=loaded)
    studio.draw(patched)
    (entry,) = find_loaded(module())
    assert entry.model_memory() == size
    del entry
    comfy.model_management.unload_all_models()
    assert not find_loaded(module())
    studio.draw(patched)
    assert find_loaded(module()), "a freed student does not come back"
    comfy.model_management.free_memory(1e30, studio.model.load_device)
    assert not find_loaded(module())
    del patched, loaded
    gc.collect()
    assert module() is None, "something still holds the student's weights"


def test_models_folder_is_known(studio, student):
    import folder_paths

    assert "first.safetensors" in folder_paths.get_filename_list("dha")
    folders = list(folder_paths.get_folder_paths("dha")), list(folder_paths.get_folder_paths("checkpoints"))
    studio.host.load_pack(ROOT)
    assert folders == (folder_paths.get_folder_paths("dha"), folder_paths.get_folder_paths("checkpoints"))


def test_changed_file_is_loaded_again(studio):
    node = studio.host.nodes.NODE_CLASS_MAPPINGS["LoadDHAStudent"]
    name = studio.write_student("changing").name
    before = node.fingerprint_inputs(student_name=name)
    assert node.fingerprint_inputs(student_name=name) == before
    studio.write_student("changing", seed=5)
    assert node.fingerprint_inputs(student_name=name) != before


def test_host_computes_what_the_trainer_does(studio):
    """One forward through ComfyUI's kernels and casting layers against the same student in plain PyTorch."""
    path = studio.write_student("twin", config=dataclasses.replace(TRAINED, levels=(0, 1, 2, 3)))
    patched = studio.apply(student=studio.call("LoadDHAStudent", student_name=path.name), budget=0.3)
    twin = make_patches(load_student(path), plain_attention, [Stretch(0.3)]).as_options()
    generator, unet = torch.Generator().manual_seed(6), studio.model.model.diffusion_model
    x = torch.randn(2, 4, 11, 17, generator=generator)
    inputs = {"timesteps": torch.tensor([900.0, 100.0]), "context": torch.randn(2, 77, 128, generator=generator)}
    ours = copy.deepcopy(patched.model_options["transformer_options"])
    with torch.inference_mode():
        expected, found = (unet(x, **inputs, transformer_options=options) for options in (twin, ours))
        assert relate(unet(x, **inputs, transformer_options={}), expected) > 1e-3
    assert relate(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_precisions(studio, student, dtype):
    """Teachers kept in other precisions: the student's parts follow what the UNet computes in."""
    import comfy.sd

    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(
            str(studio.checkpoint), output_vae=False, output_clip=False, model_options={"dtype": dtype}
        )
    assert loaded[0].model.get_dtype() == dtype
    exact, drawn = studio.draw(loaded[0]), studio.draw(studio.apply(loaded[0], student=student))
    assert 1e-3 < relate(drawn, exact) < 5
    assert relate(studio.draw(studio.apply(loaded[0], student=student, budget=1.0)), exact) < 1e-5


def test_a_kernel_that_another_pack_gives_the_host_is_used(studio, student, monkeypatch):
    from comfy.ldm.modules import attention

    own, calls = attention.optimized_attention, []
    patched = studio.apply(student=student)
    monkeypatch.setattr(attention, "optimized_attention", lambda *args, **kw: calls.append(1) or own(*args, **kw))
    studio.draw()
    expected = len(calls)
    studio.draw(patched)
    landmarks = 2 * 10 * 2  # two more calls in each of ten layers, in two steps
    assert len(calls) == 2 * expected + landmarks > landmarks


class CountedSigmas(torch.Tensor):
    """Noise levels that count how often they are fetched from their device."""

    reads = 0

    def item(self):
        CountedSigmas.reads += 1
        return super().item()


def test_window_asks_the_device_once_a_step(studio, pack):
    make_clock = sys.modules[f"{pack.__name__}.nodes.apply"].make_clock
    find_stretch = make_clock(studio.model, 0.1, [0.5, 0.7])
    before, first, second, last = (
        torch.tensor([sigma, sigma]).as_subclass(CountedSigmas) for sigma in (14.0, 3.0, 1.0, 0.1)
    )
    CountedSigmas.reads = 0
    asked = (before, first, first, second, last, last)
    assert [find_stretch({"sigmas": sigmas}) for sigmas in asked] == [None, 0, 0, 1, None, None]
    assert CountedSigmas.reads == 4


def make_block(patched, height=16, width=16):
    """A function of tokens, time embedding, text, stretch and noise level: the finest level's first block, patched."""
    block = patched.model.diffusion_model.input_blocks[1][1].transformer_blocks[0]
    shared = patched.model_options["transformer_options"]

    def run(x, emb, text, stretch, level):
        place = {"block": ("input", 1), "activations_shape": [2, 32, height, width]}
        options = {**shared, **place, "dha_stretch": stretch, "sigmas": level}
        for patch in shared["patches"]["emb_patch"]:
            emb = patch(emb, 32, options)
        return block(x, context=text, transformer_options=options)

    return run


@pytest.mark.parametrize("trained", [False, True], ids=["training-free", "student"])
def test_a_block_compiles_into_one_graph(studio, student, trained):
    """Within a window, too: whether a step is ours is decided before the UNet is entered.

    Grids that move from step to step need no graph of their own.
    """
    run = make_block(studio.apply(student=student if trained else None, end=0.5))
    x, emb, text = torch.randn(2, 256, 32), torch.randn(2, 128), torch.randn(2, 77, 128)
    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    first, second = torch.tensor([2.0]), torch.tensor([0.7])
    with torch.no_grad():
        for level in (first, second):
            torch.testing.assert_close(compiled(x, emb, text, 0, level), run(x, emb, text, 0, level))
        assert counter.frame_count == 1
        torch.testing.assert_close(compiled(x, emb, text, None, first), run(x, emb, text, None, first))
        for other in (run(x, emb, text, None, first), run(x, emb, text, 0, second)):
            assert relate(run(x, emb, text, 0, first), other) > 1e-5


@pytest.mark.parametrize("trained", [False, True], ids=["training-free", "student"])
def test_a_preset_compiles_into_a_graph_for_each_stretch_and_one_for_the_exact_rest(studio, student, trained):
    """With another preset or size before it, too: numbers that have changed are symbols to the compiler."""
    emb, text = torch.randn(2, 128), torch.randn(2, 77, 128)
    torch._dynamo.reset()  # it compiles a function eight times at most
    for preset, height, width in (("quality", 16, 16), ("balanced", 24, 16)):
        patched = studio.apply(student=student if trained else None, preset=preset)
        run, x = make_block(patched, height, width), torch.randn(2, height * width, 32)
        counter = CompileCounter()
        compiled = torch.compile(run, backend=counter, fullgraph=True)
        with torch.no_grad():
            for stretch, levels in ((0, (9.0, 3.0)), (1, (1.0, 0.7)), (None, (0.1, 0.05))):
                for level in map(torch.tensor, ([level] for level in levels)):
                    torch.testing.assert_close(
                        compiled(x, emb, text, stretch, level), run(x, emb, text, stretch, level)
                    )
        assert counter.frame_count == 3
