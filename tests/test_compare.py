"""Compare Models and Compare Pictures, and the shipped graphs, in a real ComfyUI server."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from workflows.formats import fill_defaults, to_api
from workflows.graphs import CHECKPOINT, FOLDER, STUDENT, Picture, build_examples, compare, node, prepare, time_models
from workflows.server import ServerError, find_comfyui, serve

PICTURE = Picture("red apple left of lemon, noto style, sky blue background", width=64, height=64, steps=3)
TEACHER = FOLDER / "models" / "checkpoints" / CHECKPOINT
OURS = ("CompareModels", "ComparePictures")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if not TEACHER.is_file():
        pytest.skip(f"{TEACHER.name} is not there")
    with serve(find_comfyui(None), tmp_path_factory.mktemp("comfyui")) as running:
        running.info = running.get("/object_info")
        yield running


def run(server, graph, **kwargs):
    return server.run(fill_defaults(graph, server.info), **kwargs)


def read_latent(server, outcome, key) -> torch.Tensor:
    return load(server.fetch(outcome.outputs[key]["latents"][0]))["latent_tensor"]


def read_picture(server, entry) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.fetch(entry)))).astype(float) / 255


def compare_colours(first: int, second: int, sizes=((16, 16), (16, 16)), **inputs):
    """Two plain pictures, given as 0xRRGGBB, through Compare Pictures (node 3)."""
    graph = {
        str(key): node("EmptyImage", width=width, height=height, batch_size=1, color=colour)
        for key, (width, height), colour in zip((1, 2), sizes, (first, second), strict=True)
    }
    return graph | {"3": node("ComparePictures", original=["1", 0], student=["2", 0], **inputs)}


def plain(graph):
    return graph["7"]["inputs"]


def masked(graph):
    """From the first samples instead of noise alone, half of the picture masked, batch entries 1 and 2 of 3."""
    graph["4"]["inputs"]["batch_size"] = 3
    base = {**graph["7"]["inputs"], "model": ["1", 0]}
    for key in ("original", "student", "repeats"):
        base.pop(key, None)
    graph["20"] = node("KSampler", **{**base, "seed": 5})
    graph["21"] = node("LatentFromBatch", samples=["20", 0], batch_index=1, length=2)
    graph["22"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["23"] = node("SolidMask", value=0.0, width=64, height=64)
    graph["24"] = node("MaskComposite", destination=["23", 0], source=["22", 0], x=0, y=0, operation="add")
    graph["25"] = node("SetLatentNoiseMask", samples=["21", 0], mask=["24", 0])
    graph["7"]["inputs"] |= {"latent_image": ["25", 0], "denoise": 0.6, "sampler_name": "euler_ancestral"}
    return graph["7"]["inputs"]


@pytest.mark.parametrize("change", [plain, masked])
def test_both_latents_are_ksamplers_bit_for_bit(server, change):
    graph = time_models(CHECKPOINT, PICTURE, repeats=2)
    settings = dict(change(graph))
    models = {"original": settings.pop("original"), "student": settings.pop("student")}
    del settings["repeats"]
    graph["30"] = node("KSampler", model=models["original"], **settings)
    graph["31"] = node("KSampler", model=models["student"], **settings)
    graph["32"] = node("KSampler", model=models["original"], **{**settings, "seed": 99})
    sources = {"40": ["7", 0], "41": ["7", 1], "42": ["30", 0], "43": ["31", 0], "44": ["32", 0]}
    graph |= {key: node("SaveLatent", samples=source, filename_prefix="t") for key, source in sources.items()}
    outcome = run(server, graph)
    original, student, core, core_student, other = (read_latent(server, outcome, key) for key in sources)
    assert torch.equal(original, core) and torch.equal(student, core_student)
    assert not torch.equal(original, student) and not torch.equal(original, other)
    difference = ((student - original).norm() / original.norm()).item()
    assert json.loads(outcome.text("7"))["relative_latent_difference"] == pytest.approx(difference, rel=1e-4)


def test_report_and_progress(server):
    events = []
    graph = time_models(CHECKPOINT, PICTURE, repeats=2)
    graph["7"]["inputs"]["seed"] = 11  # so that nothing is taken from the cache
    report = json.loads(run(server, graph, on_progress=lambda *event: events.append(event)).text("7"))
    for side in ("original", "student"):
        assert report[side]["seconds"] > 0
        assert report[side]["seconds_per_step"] == pytest.approx(report[side]["seconds"] / 3)
    assert report["speedup"] == pytest.approx(report["original"]["seconds"] / report["student"]["seconds"])
    assert (report["width"], report["height"], report["steps"], report["repeats"]) == (64, 64, 3, 2)
    values = [value for key, value, total in events if key == "7" and total == 2 * (1 + 2 * 3)]
    assert values == sorted(values) and set(values) >= set(range(1, 15))


def test_a_model_is_identical_to_itself(server):
    graph = compare(CHECKPOINT, PICTURE)
    graph["7"]["inputs"]["student"] = ["1", 0]
    del graph["6"]
    report = json.loads(run(server, graph).text("12"))
    assert report["relative_latent_difference"] == 0
    assert report["psnr"] is None and report["identical"] is True and report["mean_absolute_difference"] == 0


def test_cancel_stops_the_run_and_the_server_goes_on(server):
    graph = time_models(CHECKPOINT, Picture("cancelled", width=64, height=64, steps=2000))

    def cancel(key, value, total):
        if key == "7" and value == 3:
            server.interrupt()

    with pytest.raises(ServerError, match="cancelled in CompareModels"):
        run(server, graph, on_progress=cancel)
    assert json.loads(run(server, compare_colours(0, 0)).text("3"))["identical"]


def test_pictures_side_by_side(server):
    graph = compare_colours(0x000000, 0x333333, amplify=4.0) | {"4": node("PreviewAny", source=["3", 1])}
    outcome = run(server, graph)
    report = json.loads(outcome.text("3"))
    assert report["psnr"] == pytest.approx(13.979, abs=1e-2)
    assert report["mean_absolute_difference"] == pytest.approx(0.2, abs=1e-4)
    assert json.loads(outcome.text("4")) == report
    pixels = read_picture(server, outcome.images("3")[0])
    assert pixels.shape == (16, 48, 3)
    assert np.allclose(pixels[:, :16], 0) and np.allclose(pixels[:, 16:32], 0.2, atol=0.01)
    hot = pixels[0, 32]
    mild = read_picture(server, run(server, compare_colours(0, 0x333333, amplify=1.0)).images("3")[0])[0, 32]
    none = read_picture(server, run(server, compare_colours(0x333333, 0x333333)).images("3")[0])[0, 32]
    assert hot.sum() > mild.sum() > none.sum() and none.sum() < 0.1


def test_pictures_of_different_sizes_are_refused(server):
    with pytest.raises(ServerError, match="original 1 of 16x16, student 1 of 24x16"):
        run(server, compare_colours(0, 0, sizes=((16, 16), (24, 16))))


def test_a_report_that_is_none_is_refused(server):
    graph = compare_colours(0, 0, report=["9", 0]) | {"9": node("PrimitiveString", value="hello")}
    with pytest.raises(ServerError, match="found 'hello' as report"):
        run(server, graph)


def test_a_wrong_file_name_is_explained(server):
    graph = prepare("missing.safetensors", PICTURE) | {"9": node("PreviewAny", source=["1", 0])}
    with pytest.raises(ServerError, match=r"CheckpointLoaderSimple \(node 1\).*missing.safetensors"):
        run(server, graph)


@pytest.mark.parametrize("name", OURS)
def test_every_input_has_a_tooltip(server, name):
    inputs = server.info[name]["input"]
    every = {**inputs["required"], **inputs.get("optional", {})}
    assert every and all(spec[1].get("tooltip") for spec in every.values())


@pytest.mark.parametrize("name", ["smallest.json", "compare.json"])
def test_shipped_graphs_are_up_to_date_and_run(server, name):
    if not (FOLDER / "models" / "dha" / STUDENT).is_file():
        pytest.skip(f"{STUDENT} is not there")
    shipped = json.loads((FOLDER / name).read_text())
    assert shipped == build_examples(server.info)[name], "write it anew: python -m workflows.graphs"
    outcome = server.run(to_api(shipped, server.info))
    assert read_picture(server, outcome.images("9" if name == "smallest.json" else "10")[0]).shape == (128, 128, 3)


def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    with (
        pytest.raises(ServerError, match="(?s)exit status 2.*unrecognized arguments: --nonsense"),
        serve(find_comfyui(None), tmp_path, flags=["--nonsense"]),
    ):
        pass


def test_a_folder_without_comfyui_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--comfyui PATH"):
        find_comfyui(Path(tmp_path))
