"""One UNet step as ComfyUI's sampler takes it, timed subject by subject in turn."""

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .subjects import Subject

TEXT_TOKENS = 77
SIGMA = 3.0  # the middle of the sampling; the time of a step does not depend on it
MIN_LAP = 0.2  # seconds: shorter steps are timed several at once
MAX_STEPS = 100


class Size(NamedTuple):
    """A picture's width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def tokens(self) -> int:
        """Tokens of the UNet's finest level."""
        return self.width * self.height // 64

    @property
    def work(self) -> float:
        """SD-2.1's FLOPs at this size in units of the linear part at 512 x 512, 85 % of the whole there."""
        relative = self.tokens / 4096
        return relative + 0.18 * relative**2


class Inputs(NamedTuple):
    """What a step gets: latents (B, C, H, W), noise levels (B,), text (B, 77, E)."""

    latent: Tensor
    sigma: Tensor
    text: Tensor


@dataclass
class Record:
    """One subject at one size.

    `seconds` a step by round; `pairs` of query and key that all attentions of a step computed; `difference` of the
    output to the unpatched one, relative norm, None where that is no number; `peak_memory` and `step_memory` (beyond
    what lay on the device before) in bytes, CUDA only.
    """

    name: str
    title: str
    pairs: int
    difference: float | None
    warm_up_seconds: float
    seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    step_memory: int | None = None


@dataclass
class SizeResult:
    """All subjects at one size, the unpatched one first; every round times each of them once."""

    size: Size
    steps_per_lap: int
    records: list[Record]


class PairCounter(TorchFunctionMode):
    """Counts the pairs of query and key in PyTorch's fused attention while it is entered; heads are not counted."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.pairs += q.shape[0] * q.shape[-2] * k.shape[-2]
        return func(*args, **(kwargs or {}))


def synchronise(device: torch.device) -> None:
    """Wait for the work queued on a CUDA device; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_inputs(model, size: Size, batch: int) -> Inputs:
    """Noise for a size that is the same in every run."""
    generator, device = torch.Generator().manual_seed(1), model.load_device
    channels, width = model.model.latent_format.latent_channels, model.model.model_config.unet_config["context_dim"]
    latent = torch.randn(batch, channels, size.height // 8, size.width // 8, generator=generator) * SIGMA
    text = torch.randn(batch, TEXT_TOKENS, width, generator=generator)
    return Inputs(latent.to(device), torch.full((batch,), SIGMA, device=device), text.to(device))


def load(model, inputs: Inputs) -> None:
    """Have ComfyUI load a subject as its sampler would; clones share weights, so none are moved from lap to lap."""
    import comfy.model_management

    models = [model, *model.get_nested_additional_models()]
    required = model.memory_required([inputs.latent.shape[0] * 2, *inputs.latent.shape[1:]])
    comfy.model_management.load_models_gpu(models, memory_required=required)
    model.pre_run()


def run_step(model, inputs: Inputs) -> Tensor:
    """One call of the UNet, options as in ComfyUI's `calc_cond_batch`; the predicted picture (B, C, H, W)."""
    options = {
        **model.model_options["transformer_options"],
        "cond_or_uncond": [0],
        "uuids": [uuid.uuid4()],
        "sigmas": inputs.sigma,
    }
    return model.model.apply_model(inputs.latent, inputs.sigma, c_crossattn=inputs.text, transformer_options=options)


def time_steps(model, inputs: Inputs, steps: int) -> float:
    """Seconds a step, mean of `steps` in a row."""
    device = inputs.latent.device
    synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        run_step(model, inputs)
    synchronise(device)
    return (time.perf_counter() - start) / steps


def relate(output: Tensor, reference: Tensor) -> float | None:
    """Norm of the difference over the norm of the reference; None where that is no number."""
    ratio = ((output - reference).float().norm() / reference.float().norm()).item()
    return ratio if math.isfinite(ratio) else None


def warm_up(subject: Subject, inputs: Inputs, reference: Tensor | None) -> tuple[Record, Tensor]:
    """One uncounted step that also says what the subject computes; its output too.

    Raises RuntimeError when nothing goes through PyTorch's attention, whose time is what is compared.
    """
    load(subject.model, inputs)
    start = time.perf_counter()
    with PairCounter() as counter:
        output = run_step(subject.model, inputs)
    synchronise(output.device)
    seconds = time.perf_counter() - start
    if not counter.pairs:
        raise RuntimeError(
            f"{subject.name} made no call of PyTorch's attention; ComfyUI was told to use it, "
            "so another package has replaced it: start without it"
        )
    difference = relate(output, output if reference is None else reference)
    return Record(subject.name, subject.title, counter.pairs, difference, seconds), output


def time_lap(subject: Subject, record: Record, inputs: Inputs, steps: int) -> None:
    """Add one round's time to the record, and the highest memory on CUDA."""
    load(subject.model, inputs)
    device = inputs.latent.device
    if device.type != "cuda":
        record.seconds.append(time_steps(subject.model, inputs, steps))
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    record.seconds.append(time_steps(subject.model, inputs, steps))
    peak = torch.cuda.max_memory_allocated(device)
    record.peak_memory = max(record.peak_memory or 0, peak)
    record.step_memory = max(record.step_memory or 0, peak - before)


def choose_steps(model, inputs: Inputs, records: Sequence[Record]) -> int:
    """Steps of a lap: one where it is long enough, else as many of the unpatched model's as fill MIN_LAP."""
    # The first warm-up sets libraries up and may take seconds where a step takes milliseconds: the quickest one counts.
    if min(record.warm_up_seconds for record in records) > 5 * MIN_LAP:
        return 1
    load(model, inputs)
    return max(1, min(MAX_STEPS, math.ceil(MIN_LAP / time_steps(model, inputs, 1))))


def measure_size(
    subjects: Sequence[Subject],
    size: Size,
    batch: int,
    rounds: int,
    deadline: float = math.inf,
    save: Callable[[SizeResult], None] = lambda result: None,
) -> SizeResult:
    """Warm every subject up, then time all of them round by round; `save` is called after each round.

    No round starts that would end after `deadline` (on `time.monotonic`'s clock), except the first. Rounds start with
    another subject each, so that no subject always follows the same one.
    """
    inputs = draw_inputs(subjects[0].model, size, batch)
    with torch.inference_mode(), tqdm(total=len(subjects) * (1 + rounds), desc=str(size), unit="lap") as bar:
        records, reference = [], None
        for subject in subjects:
            bar.set_postfix_str(f"warm-up {subject.name}")
            record, output = warm_up(subject, inputs, reference)
            reference = output if reference is None else reference
            records.append(record)
            bar.update()
        steps = choose_steps(subjects[0].model, inputs, records)
        result, longest = SizeResult(size, steps, records), 0.0
        for number in range(rounds):
            begin = time.monotonic()
            if number and begin + longest > deadline:
                break
            for index in range(len(subjects)):
                turn = (index + number) % len(subjects)
                bar.set_postfix_str(subjects[turn].name)
                time_lap(subjects[turn], records[turn], inputs, steps)
                bar.update()
            longest = max(longest, time.monotonic() - begin)
            save(result)
        bar.total = bar.n
    return result


def share_time(sizes: Sequence[Size], index: int, end: float) -> float:
    """Deadline of the size at `index`: what is left until `end` is shared among the remaining sizes by their work."""
    now = time.monotonic()
    return now + max(0.0, end - now) * sizes[index].work / sum(size.work for size in sizes[index:])
