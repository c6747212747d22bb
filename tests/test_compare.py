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

from dha.fidelity import ssim
from dha.peak import LiveTensors
from workflows.formats import fill_defaults
from workflows.graphs import CHECKPOINT, FOLDER, Picture, compare, node, prepare, time_models
from workflows.server import ServerError, find_comfyui, serve

PICTURE = Picture("red apple left of lemon, noto style, sky blue background", width=64, height=64, steps=3)
TEACHER = FOLDER / "models" / "checkpoints" / CHECKPOINT


def run(server, graph, **kwargs):
    return server.run(fill_defaults(graph, server.info), **kwargs)


def read_latent(server, outcome, key) -> torch.Tensor:
    return load(server.fetch(outcome.outputs[key]["latents"][0]))["latent_tensor"]


def read_picture(server, entry) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.fetch(entry)))).astype(float) / 255


def read_difference(server, graph) -> np.ndarray:
    return read_picture(server, run(server, graph).outputs["3"]["difference"][0])


def compare_colours(first: int, second: int, sizes=((16, 16), (16, 16)), **inputs):
    """Two plain pictures, given as 0xRRGGBB, through Compare Pictures (node 3)."""
    graph = {
        str(key): node("EmptyImage", width=width, height=height, batch_size=1, color=colour)
        for key, (width, height), colour in zip((1, 2), sizes, (first, second), strict=True)
    }
    return graph | {"3": node("DHAComparePictures", original=["1", 0], student=["2", 0], **inputs)}


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
    report = json.loads(run(server, graph, on_progress=lambda *event: events.append(event)).text("7"))
    for side in ("original", "student"):
        assert report[side]["seconds"] > 0
        assert report[side]["seconds_per_step"] == pytest.approx(report[side]["seconds"] / 3)
        assert report[side]["peak_memory"] > 64 * 64  # bytes, and the picture alone has as many pixels
    assert report["student"]["weights"] >= report["original"]["weights"] > TEACHER.stat().st_size / 2
    assert report["speedup"] == pytest.approx(report["original"]["seconds"] / report["student"]["seconds"])
    assert (report["width"], report["height"], report["steps"], report["repeats"]) == (64, 64, 3, 2)
    values = [value for key, value, total in events if key == "7" and total == 2 * (3 + 2 * 3)]
    assert values == sorted(values) and set(values) >= set(range(1, 19))


def test_the_same_graph_measures_again(server):
    first, second = (json.loads(run(server, time_models(CHECKPOINT, PICTURE)).text("7")) for _ in range(2))
    assert first["original"]["seconds"] != second["original"]["seconds"]
    assert first["relative_latent_difference"] == second["relative_latent_difference"]


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

    with pytest.raises(ServerError, match="cancelled in DHACompareModels"):
        run(server, graph, on_progress=cancel)
    assert json.loads(run(server, compare_colours(0, 0)).text("3"))["identical"]


def test_pictures_side_by_side(server):
    graph = compare_colours(0x000000, 0x333333, amplify=4.0) | {"4": node("PreviewAny", source=["3", 1])}
    graph |= {"5": node("PreviewImage", images=["3", 0]), "6": node("PreviewImage", images=["3", 2])}
    outcome = run(server, graph)
    report = json.loads(outcome.text("3"))
    assert report["psnr"] == pytest.approx(13.979, abs=1e-2)
    assert report["mean_absolute_difference"] == pytest.approx(0.2, abs=1e-4)
    assert json.loads(outcome.text("4")) == report
    pixels = read_picture(server, outcome.images("5")[0])
    assert pixels.shape == (16, 48, 3)
    assert np.allclose(pixels[:, :16], 0) and np.allclose(pixels[:, 16:32], 0.2, atol=0.01)
    parts = [read_picture(server, outcome.outputs["3"][name][0]) for name in ("original", "student", "difference")]
    assert np.array_equal(np.concatenate(parts, axis=1), pixels)
    assert np.array_equal(read_picture(server, outcome.images("6")[0]), parts[2])
    hot = pixels[0, 32]
    mild = read_difference(server, compare_colours(0, 0x333333, amplify=1.0))[0, 0]
    none = read_difference(server, compare_colours(0x333333, 0x333333))[0, 0]
    assert hot.sum() > mild.sum() > none.sum() and none.sum() < 0.1


def test_a_figure_that_cannot_be_had_is_left_out(server):
    """SSIM needs 11 pixels; the table then has a dash instead of a number."""
    tiny = run(server, compare_colours(0, 0x333333, sizes=((8, 8), (8, 8))))
    assert json.loads(tiny.text("3"))["ssim"] is None
    rows = {row[0]: row[2] for row in json.loads(tiny.outputs["3"]["table"][0])}
    assert rows["SSIM"] == "-" and rows["PSNR"] == "14.0 dB"
    whole = json.loads(run(server, compare_colours(0x333333, 0x333333)).text("3"))
    assert whole["ssim"] == pytest.approx(1) and whole["perceptual_distance"] in (None, pytest.approx(0))


@pytest.mark.parametrize("prefix", ["figures", "deep/er/figures"])
def test_a_saved_report_is_the_report_and_a_second_one_replaces_nothing(server, prefix):
    graph = compare_colours(0, 0x333333)
    graph["9"] = node("DHASaveReport", report=["3", 1], filename_prefix=prefix)
    outcome = run(server, graph)
    graph["3"]["inputs"]["amplify"] = 2.0
    names = [outcome.text("9"), run(server, graph | {"2": graph["1"]}).text("9")]
    assert names == [f"{prefix}_00001_.json", f"{prefix}_00002_.json"]
    files = [json.loads((server.base / "output" / name).read_text()) for name in names]
    assert files[0] == json.loads(outcome.text("3")) and files[1]["identical"]
    assert not [*(server.base / "output").rglob("*.partial")]


def test_a_report_is_not_saved_outside_of_the_output_folder(server):
    graph = compare_colours(0, 0) | {"9": node("DHASaveReport", report=["3", 1], filename_prefix="../figures")}
    with pytest.raises(ServerError, match="outside the output folder"):
        run(server, graph)


def test_pictures_of_different_sizes_are_refused(server):
    with pytest.raises(ServerError, match="original 1 of 16x16, student 1 of 24x16"):
        run(server, compare_colours(0, 0, sizes=((16, 16), (24, 16))))


class OnGPU(torch.Tensor):
    """Pictures as ComfyUI keeps them with --gpu-only: nothing on the CPU works with them before they are fetched."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function is torch.Tensor.as_subclass:
            return super().__torch_function__(function, types, args, kwargs)
        raise RuntimeError("Expected all tensors to be on the same device")


def test_pictures_on_the_gpu_are_measured_on_the_cpu(module):
    first, second = torch.rand(2, 1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    measure = module("compare_pictures").measure_difference
    assert measure(first.as_subclass(OnGPU), second.as_subclass(OnGPU)) == measure(first, second)


def test_the_similarity_of_a_batch_takes_no_more_memory_than_that_of_a_picture(module):
    first, second = torch.rand(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    peaks = []
    for count in (1, 8):
        with LiveTensors() as live:
            found = module("compare_pictures").measure_structure(first[:count], second[:count])
        peaks.append(live.highest)
    assert peaks[1] < 1.1 * peaks[0]
    torch.testing.assert_close(found, ssim(first, second))


def test_a_report_that_is_none_is_refused(server):
    graph = compare_colours(0, 0, report=["9", 0]) | {"9": node("PrimitiveString", value="hello")}
    with pytest.raises(ServerError, match="found 'hello' as report"):
        run(server, graph)


@pytest.mark.parametrize("others", ['{"psnr": 99, "speedup": 2}', '{"speedup": 2, "original": 1, "student": {}}'])
def test_a_report_does_not_say_what_was_measured_here(server, others):
    """Nor is one taken for that of Compare Models that is not."""
    graph = compare_colours(0, 0x333333, report=["9", 0]) | {"9": node("PrimitiveString", value=others)}
    outcome = run(server, graph)
    report = json.loads(outcome.text("3"))
    assert report["psnr"] == pytest.approx(13.979, abs=1e-2) and report["speedup"] == 2
    assert [row[0] for row in json.loads(outcome.outputs["3"]["table"][0])][-1] == "perceptual distance"


def test_a_wrong_file_name_is_explained(server):
    graph = prepare("missing.safetensors", PICTURE) | {"9": node("PreviewAny", source=["1", 0])}
    with pytest.raises(ServerError, match=r"CheckpointLoaderSimple \(node 1\).*missing.safetensors"):
        run(server, graph)


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
