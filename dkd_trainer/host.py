"""The one place of the trainer that knows ComfyUI: it makes `comfy` importable and loads teachers as ComfyUI does."""

import importlib.util
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def ensure_comfy(path: str | None) -> None:
    """Make `import comfy` work: start this program again with ComfyUI on PYTHONPATH when it is not there yet.

    Raises FileNotFoundError when no ComfyUI is given or found.
    """
    if importlib.util.find_spec("comfy") is None:
        path = path or os.environ.get("COMFYUI_PATH")
        if not path or not (Path(path) / "comfy" / "sd.py").is_file():
            raise FileNotFoundError(f"ComfyUI was not found at {path!r}; give its folder with --comfyui or COMFYUI_PATH")
        paths = [str(Path(path).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True


def register_mini():
    """Teach the stock loader the mini architecture from the same file that the pack uses; returns that module."""
    spec = importlib.util.spec_from_file_location("dha_mini_sd21", ROOT / "nodes" / "mini_sd21.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    return module
