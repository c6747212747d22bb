"""The processes of a run, as `accelerate launch` (GPUs) or `torchrun` (CPUs) start them: one is as good as many."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ..fields import SettingsError
from ..settings import TrainSettings
from .state import list_differences

PATIENCE = timedelta(hours=2)  # the others wait while the first encodes pictures or draws sheets


class Processes:
    """This process's place among all of them, and what they say to each other.

    Raises SettingsError when accelerate is not installed or the batch cannot be shared out evenly.
    """

    def __init__(self, train: TrainSettings):
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise SettingsError("the trainer needs accelerate; pip install accelerate") from error
        if train.device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("setting 'train.device' is 'cuda', but no CUDA device was found; use 'cpu' or 'auto'")
        cpu = train.device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.count, self.place, self.device = state.num_processes, state.process_index, state.device
        parts = self.count * train.accumulation
        if train.batch % parts:
            raise SettingsError(
                f"setting 'train.batch' is {train.batch}, expected a multiple of {parts} ({self.count} processes times "
                f"{train.accumulation} accumulated parts)"
            )
        if self.device.type == "cuda" and train.precision == "bf16":
            require_bf16()
        self.size = train.batch // parts
        self.accumulation = train.accumulation

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.place == 0

    def list_parts(self) -> list[slice]:
        """The parts of the whole batch that this process takes, one after the other."""
        first = self.place * self.accumulation
        return [slice(i * self.size, (i + 1) * self.size) for i in range(first, first + self.accumulation)]

    def average(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count == 1:
            return values
        from accelerate.utils import reduce

        return reduce(values, "mean")

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean gradients in one message: a student is small, so nothing is gained by sending while computing."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        flat = self.average(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def hand_out(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def require_same(self, run: dict[str, Any]) -> None:
        """Raise SettingsError, on all processes, unless all describe the same run: hosts may have their own files."""
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        first, *others = gather_object([run])
        for place, other in enumerate(others, start=1):
            if differences := list_differences(first, other):
                raise SettingsError(
                    f"process {place} has another run than the first one, where {'; '.join(differences[:3])}; give all "
                    "hosts the same files and settings"
                )


def require_bf16() -> None:
    """Raise SettingsError for a GPU that only emulates bf16: fused attention has no kernel for it there."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SettingsError(
            f"setting 'train.precision' is 'bf16', which {torch.cuda.get_device_name()} does not compute in; expected "
            "'fp32' on GPUs before Ampere"
        )
