"""What every figure has to name beside it: processor, versions, commit and command."""

import os

import torch

from ..record import current_command, current_commit, name_processor


def describe_run(device: torch.device) -> dict[str, str]:
    """Hardware, versions, commit and command line of this very run."""
    threads = torch.get_num_threads()
    where = f"{name_processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} ({where})"
    return {
        "command": current_command("dkd_trainer"),
        "commit": current_commit(),
        "hardware": where,
        "torch": torch.__version__,
        "comfyui": read_comfyui_version(),
    }


def read_comfyui_version() -> str:
    import comfyui_version

    return comfyui_version.__version__
