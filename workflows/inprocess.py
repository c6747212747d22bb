"""ComfyUI inside this very process: its own loaders, samplers and nodes, without a server; for tests and benchmarks."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class Silence:
    """Stands in for ComfyUI's PromptServer: nodes may report progress to it, nobody listens."""

    client_id = None
    last_node_id = None

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        pass

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        pass


class Host:
    """A booted ComfyUI; `nodes` is its own top-level module, which holds every loaded node by id."""

    def __init__(self, nodes: ModuleType):
        self.nodes = nodes
        self.root = Path(nodes.__file__).resolve().parent

    def load_extra(self, name: str) -> None:
        """Load one of ComfyUI's extra node files: `hypertile` is comfy_extras/nodes_hypertile.py."""
        self.load(self.root / "comfy_extras" / f"nodes_{name}.py", "comfy_extras")

    def load_pack(self, root: Path) -> ModuleType:
        """Load a custom node pack as ComfyUI does at its start; returns the pack's module. Raises ImportError."""
        self.load(root, "custom_nodes")
        return sys.modules[str(root).replace(".", "_x_")]

    def load(self, path: Path, parent: str) -> None:
        if not asyncio.run(self.nodes.load_custom_node(str(path), module_parent=parent)):
            raise ImportError(f"ComfyUI could not load {path}; its log above says why")

    @torch.inference_mode()
    def call(self, node_id: str, **inputs: Any) -> tuple:
        """Outputs of a node, executed as ComfyUI's executor does, validation of the inputs left out."""
        node = self.nodes.NODE_CLASS_MAPPINGS[node_id]
        if hasattr(node, "PREPARE_CLASS_CLONE"):
            output = getattr(node.PREPARE_CLASS_CLONE({}), node.FUNCTION)(**inputs)
        else:
            output = getattr(node(), node.FUNCTION)(**inputs)
        return tuple(output) if isinstance(output, tuple) else tuple(output.result or ())

    @torch.inference_mode()
    def sample(
        self,
        model,
        positive,
        negative,
        latent: dict[str, torch.Tensor],
        *,
        seed: int = 0,
        steps: int = 2,
        cfg: float = 4.0,
        denoise: float = 1.0,
        sampler: str = "euler",
        scheduler: str = "normal",
    ) -> torch.Tensor:
        """What the KSampler node makes of these inputs: latents (B, 4, H/8, W/8)."""
        (output,) = self.nodes.common_ksampler(
            model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise
        )
        return output["samples"]


def boot(base: Path, cpu: bool | None = None) -> Host:
    """Start ComfyUI's machinery with its models, input and output below `base`; takes a few seconds, once per process.

    Without `cpu`, the GPU is used where there is one. Raises ImportError when ComfyUI is not on the path or something
    else was imported as `nodes` before, and RuntimeError when ComfyUI already runs with another `base`.
    """
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available() if cpu is None else cpu
    args.use_pytorch_cross_attention = True
    args.base_directory = str(base.resolve())
    import comfy.utils
    import folder_paths
    import utils.extra_config  # noqa: F401  ahead of ComfyUI's nodes, which puts another `utils` on the path

    nodes = import_nodes(Path(comfy.utils.__file__).parent.parent)
    import server

    if Path(folder_paths.base_path) != base.resolve():
        raise RuntimeError(
            f"ComfyUI already runs in this process with {folder_paths.base_path}, not {base}; start a new process"
        )
    comfy.utils.set_progress_bar_enabled(False)
    server.PromptServer.instance = Silence()
    return Host(nodes)


def import_nodes(root: Path) -> ModuleType:
    """ComfyUI's top-level module `nodes`, even where another one comes first on the path; raises ImportError."""
    if "nodes" not in sys.modules:
        spec = importlib.util.spec_from_file_location("nodes", root / "nodes.py")
        sys.modules["nodes"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["nodes"])
    nodes = sys.modules["nodes"]
    if Path(nodes.__file__).resolve() != (root / "nodes.py").resolve():
        raise ImportError(f"{nodes.__file__} was imported as `nodes`, ComfyUI needs its own there; start a new process")
    return nodes
