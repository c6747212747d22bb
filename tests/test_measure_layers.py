"""DHA Measure Layers: what this machine's layers gain is measured, kept, and what `auto` goes by."""

import json
import sys

import pytest
import torch

from dha.payoff import choose_payoff
from workflows.formats import fill_defaults
from workflows.graphs import CHECKPOINT, node
from workflows.server import ServerError


def measure(server, sizes: str, **kwargs):
    graph = {"1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}
    graph["2"] = node("DHAMeasureLayers", model=["1", 0], sizes=sizes, pictures=1)
    return server.run(fill_defaults(graph, server.info), **kwargs)


@pytest.fixture
def nodes(pack, tmp_path, monkeypatch):
    """A module of the pack's nodes by name, with a user folder of its own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return lambda name: sys.modules[f"{pack.__name__}.nodes.{name}"]


def test_every_layer_is_timed_and_shown(server):
    events = []
    outcome = measure(server, "128, 256x128", on_progress=lambda *event: events.append(event))
    report = json.loads(outcome.text("2"))
    assert (server.base / "user" / "dha" / report["kept_in"]).is_file()
    assert {(entry["width"], entry["height"], entry["level"]) for entry in report["layers"]} == {
        (width, 128, level) for width in (128, 256) for level in range(3)
    }
    for entry in report["layers"]:
        assert entry["seconds"] > 0 and entry["speedup"] > 0
        assert entry["keys"] <= entry["share"] * entry["tokens"] + 0.5
    rows = json.loads(outcome.outputs["2"]["table"][0])
    assert rows[0] == ["size", "level", "as it is", "quality", "balanced", "fast"]
    assert [row[:2] for row in rows[1:4]] == [["128x128", "finest"], ["128x128", "second"], ["128x128", "third"]]
    assert "balanced pays at 128x128: " in outcome.outputs["2"]["summary"][0]
    values = [(value, total) for key, value, total in events if key == "2" and total > 1]
    assert values == sorted(values) and values[-1] == (36, 36)


def test_apply_dha_runs_again_after_a_measurement_and_not_before(server):
    graph = {"1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}
    graph["2"] = node("ApplyDHA", model=["1", 0])
    text = {"clip": ["1", 1], "text": "owl"}
    graph["3"], graph["4"] = node("CLIPTextEncode", **text), node("EmptyLatentImage", width=128, height=128)
    settings = {"model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0], "steps": 1}
    graph["5"] = node("KSampler", seed=0, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0, **settings)
    graph["6"] = node("VAEDecode", samples=["5", 0], vae=["1", 2])
    graph["7"] = node("PreviewImage", images=["6", 0])
    graph = fill_defaults(graph, server.info)

    def list_kept() -> set[str]:
        before = server.get("/history").keys()
        server.run(graph)
        (ended,) = server.get("/history").keys() - before
        messages = dict(server.get(f"/history/{ended}")[ended]["status"]["messages"])
        return set(messages["execution_cached"]["nodes"])

    list_kept()
    assert list_kept() == set(graph)
    file = server.base / "user" / "dha" / "layers.json"  # as the node writes it: ComfyUI keeps one graph's results
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"format": "dha-layers-1", "tables": {}}')
    assert list_kept() == {"1", "3", "4"}


@pytest.mark.parametrize("sizes", ["", "abc", "100"])
def test_wrong_sizes_are_explained(server, sizes):
    with pytest.raises(ServerError, match="DHA Measure Layers found .*(expected|enter)"):
        measure(server, sizes)


def test_auto_goes_by_what_was_measured_here(studio, nodes):
    """The mini's widths are in no shipped table and never held back, until they are measured."""
    own, model = nodes("payoff"), studio.model
    find_payoff, dtype = own.find_payoff, own.name_precision(model)
    assert find_payoff(model).pays(256, 32, 16)
    own.keep_rows(model, dtype, [[32, 256, 0.0625, 0.9], [32, 1024, 0.0625, 1.4]], {})
    pays = find_payoff(model).pays
    assert not pays(256, 32, 16) and pays(1024, 32, 64) and not pays(64, 32, 4), "below all that was measured"
    assert not pays(1024, 32, 65), "more keys than were measured"
    assert pays(256, 64, 16), "of this width nothing was measured"
    own.keep_rows(model, dtype, [[32, 256, 0.0625, 1.2]], {})
    assert find_payoff(model).pays(256, 32, 16), "measured again"
    assert find_payoff(model).pays(1024, 32, 64), "the other sizes are kept"
    own.keep_rows(model, "another precision", [[32, 256, 0.0625, 0.5]], {})
    assert find_payoff(model).pays(256, 32, 16)


def test_precision_is_that_of_the_computation(studio, nodes):
    """As the core node ModelComputeDtype sets it; the model that it was cloned from stays as it is."""
    own, model = nodes("payoff"), studio.model.clone()
    model.set_model_compute_dtype(torch.bfloat16)
    assert own.name_precision(model) == "bf16" and own.name_precision(studio.model) == "fp32"


def test_a_queued_graph_notices_a_new_measurement(studio, nodes):
    apply, own = nodes("apply").ApplyDHA, nodes("payoff")
    before = apply.fingerprint_inputs(preset="fast")
    assert before == apply.fingerprint_inputs(preset="fast")
    own.keep_rows(studio.model, "fp32", [], {})
    assert before != apply.fingerprint_inputs(preset="fast")


ROWS = '{"format": "dha-layers-1", "tables": {"cpu, fp32": {"rows": [[1]]}}}'


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "x"}', ROWS])
def test_an_odd_file_is_not_used_and_the_log_says_so(studio, nodes, caplog, content):
    own = nodes("payoff")
    own.find_file().parent.mkdir()
    own.find_file().write_text(content)
    assert own.read_rows(studio.model, "fp32") == []
    assert "layers.json cannot be used" in caplog.text
    own.keep_rows(studio.model, "fp32", [[32, 256, 0.5, 1.0]], {})
    assert own.read_rows(studio.model, "fp32") == [[32, 256, 0.5, 1.0]]


def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_lost(studio, nodes, tmp_path):
    (tmp_path / "dha").write_text("a file where the folder belongs")
    with pytest.raises(ValueError, match="cannot write dha/layers.json into ComfyUI's user folder"):
        nodes("payoff").keep_rows(studio.model, "fp32", [], {})
    assert (tmp_path / "dha").read_text() == "a file where the folder belongs"


def test_own_rows_stand_in_for_the_shipped_ones_of_their_width_alone():
    shipped = {"device": "cpu", "dtype": "fp32", "rows": [[320, 4096, 0.5, 2.0], [640, 1024, 0.5, 2.0]]}
    payoff = choose_payoff([shipped], "cpu", "fp32", [[320, 4096, 0.5, 0.9]])
    assert not payoff.pays(4096, 320, 64) and payoff.pays(1024, 640, 64)


def test_a_layer_that_does_not_fit_is_left_out(nodes, studio):
    """The others are still measured; where the layer itself does not fit there is nothing to say."""
    times = nodes("layer_times")
    layer = times.Layer(times.SITES[0], 16, 16)
    x = torch.zeros(1, 256, 32)

    class Stub(torch.nn.Module):
        heads = 1

        def forward(self, *_):
            return x

    class Full(Stub):
        def forward(self, *_):
            raise torch.cuda.OutOfMemoryError("Allocation on device")

    class Students:
        config = times.FREE

        def __init__(self, site):
            self.parts = site

        def site(self, _site):
            return self.parts

        def untrain(self):
            return self

        def plan(self, *size):
            return times.Student(times.FREE, studio.architecture).plan(*size)

    rounds = []
    found = times.time_layer(Stub(), [Students(Full())], layer, x, x, lambda: rounds.append(1))
    assert len(rounds) == times.ROUNDS + 1
    assert [entry.speedup for entry in found] == [None] * len(found) and len(found) > 3
    with pytest.raises(torch.cuda.OutOfMemoryError):
        times.time_layer(Full(), [Students(Stub())], layer, x, x, lambda: None)
