"""A control branch while it is trained: its weights in the file's form, run on the teacher's own layers."""

import copy
from types import SimpleNamespace

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dha.control import PREFIX, FCNet, Pair, control_options
from dha.control_file import ControlConfig, ControlFile
from dha.control_weights import ENCODER, merge_weights, start_weights

from ..host import Teacher

PARTS = ("time_embed", "input_blocks", "middle_block")


def build_branch(teacher: Teacher, config: ControlConfig) -> FCNet:
    """An FCNet of copies of a teacher's layers."""
    encoder = SimpleNamespace(**{part: copy.deepcopy(getattr(teacher.unet, part)) for part in PARTS})
    return FCNet(encoder, attention=config.attention, norm_groups=config.norm_groups)


class Frame(nn.Module):
    """FCNet as one call from a band of the source to the pairs; its names are the published ones."""

    def __init__(self, branch: FCNet):
        super().__init__()
        self.control_model = branch

    def forward(self, x: Tensor, band: Tensor, timesteps: Tensor, context: Tensor) -> list[Pair]:
        branch = self.control_model
        return branch(x, branch.embed_hint(band), timesteps, context, {})


class TrainedBranch(nn.Module):
    """The trained parameters of a branch; what they are changes of stays the teacher's and is not among them."""

    def __init__(self, teacher: Teacher, config: ControlConfig):
        super().__init__()
        self.config = config
        state = teacher.unet.state_dict()
        base = {name: tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        branch = build_branch(teacher, config)
        weights = start_weights(branch, base, config.rank)
        self.weights = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in weights.items()})
        self.shared = [Frame(branch.to("meta")), base]  # in a list: neither counts as a part of this module

    def named_weights(self) -> dict[str, Tensor]:
        """Tensors by name, as in the file."""
        return {name.replace("/", "."): tensor for name, tensor in self.weights.items()}

    def forward(
        self, x: Tensor, band: Tensor, timesteps: Tensor, context: Tensor, checkpointing: bool = False
    ) -> list[Pair]:
        """Pairs for noisy latents x (B, 4, h, w), steered by a band (B, 4, h, w) of the source's latents."""
        frame, base = self.shared

        def run(*inputs: Tensor) -> list[Pair]:
            state = {PREFIX + name: tensor for name, tensor in merge_weights(base, self.named_weights()).items()}
            return functional_call(frame, state, inputs)

        inputs = (x, band, timesteps, context)
        return checkpoint(run, *inputs, use_reentrant=False) if checkpointing else run(*inputs)

    def as_options(self, band: Tensor, checkpointing: bool = False) -> dict:
        """`transformer_options` that steer the teacher by a band (B, 4, h, w); both halves of guidance get the same."""

        def steer(x: Tensor, timesteps: Tensor, context: Tensor, _options: dict) -> list[Pair]:
            return self(x, band.repeat(len(x) // len(band), 1, 1, 1), timesteps, context, checkpointing)

        return control_options(steer)

    def to_file(self, teacher: Teacher, training: dict) -> ControlFile:
        """The branch as its file holds it."""
        prediction = teacher.prediction
        weights = self.named_weights()
        return ControlFile(self.config, teacher.architecture, weights, teacher.fingerprint, prediction, training)
