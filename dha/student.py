"""A DHA student: the trained parts of every replaced self-attention, by site name."""

from collections.abc import Container
from dataclasses import replace

from torch import Tensor, nn

from .config import NORM_GROUPS, DHAConfig
from .hybrid import HybridSite
from .landmarks import LANDMARKS
from .official import OfficialSite
from .presets import OWN, Stretch
from .routing import ContextPlan, plan_context
from .sites import SITES, Architecture, Site

FREE_CONFIG = DHAConfig(levels=(0, 1), landmarks=LANDMARKS)  # of full-size models
START_CONFIG = replace(FREE_CONFIG, memory=32, rank=8, local=16)  # what the trainer makes when it is told nothing


class Student(nn.Module):
    """All sites of a configuration for one architecture; without trained parts it is the training-free student.

    `operations` supplies Linear and LayerNorm: torch.nn for training, ComfyUI's casting layers in the host.
    `head_width` is needed by mode `official` alone, which brings its own projections.
    """

    def __init__(self, config: DHAConfig, architecture: Architecture, operations=nn, head_width: int = 64):
        super().__init__()
        self.config, self.architecture, self.head_width = config, architecture, head_width
        self.sites = nn.ModuleDict()
        for site in self.list_sites():
            channels = architecture.channels[site.name]
            if config.mode == "official":
                module = OfficialSite(
                    channels, architecture.embedding, channels // head_width, config.sparsity, operations=operations
                )
            else:
                module = HybridSite(channels, architecture.embedding, config, operations)
            self.sites[module_key(site)] = module

    def untrain(self) -> "Student":
        """The training-free form of the same; a student without trained parts, or of mode `official`, is its own."""
        if self.config.mode == "official" or not self.sites.state_dict():
            return self
        own = self.config
        config = replace(FREE_CONFIG, levels=own.levels, token_budget=own.token_budget, max_tokens=own.max_tokens)
        return Student(config, self.architecture)

    def list_sites(self) -> list[Site]:
        """The sites whose attention this student replaces."""
        return [site for site in SITES if site.level in self.config.levels]

    def site(self, site: Site) -> HybridSite | OfficialSite:
        return self.sites[module_key(site)]

    def list_attributes(self, blocks: Container[tuple[str, int]]) -> dict[str, int]:
        """Plain values to set in the UNet, by path, where this student runs in `blocks`.

        Published students were trained with fewer groups in each transformer's norm than SD-2.x has.
        """
        if self.config.norm_groups == NORM_GROUPS:
            return {}
        places = (site.name.partition(".transformer_blocks.")[0] for site in self.list_sites() if site.block in blocks)
        return {f"{place}.norm.num_groups": self.config.norm_groups for place in places}

    def start(self) -> "Student":
        """Fresh weights that leave the training-free student's output nearly unchanged; returns itself."""
        for module in self.sites.values():
            module.start()
        return self

    def plan(self, height: int, width: int, stretch: Stretch = OWN) -> ContextPlan:
        """How the keys of a height x width level are spent in a stretch of the sampling."""
        config = self.config
        budget = config.token_budget if stretch.token_budget is None else stretch.token_budget
        most = config.max_tokens if stretch.max_tokens is None else stretch.max_tokens
        marks = config.landmarks if stretch.landmarks is None else stretch.landmarks
        return plan_context(height, width, budget, config.coarse_share, most, bool(config.router_width), marks)

    def named_weights(self) -> dict[str, Tensor]:
        """Tensors by site and part, as in the file: `middle_block.1.transformer_blocks.0.attn1.router.enter.weight`."""
        names = {module_key(site): site.name for site in self.list_sites()}
        weights = {}
        for name, tensor in self.sites.state_dict().items():
            key, _, part = name.partition(".")
            weights[f"{names[key]}.{part}"] = tensor
        return weights


def module_key(site: Site) -> str:
    """A site's name in a ModuleDict, where dots are not allowed: `output_9`."""
    return f"{site.block[0]}_{site.block[1]}"
