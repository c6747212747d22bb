"""Write a full-size SD-2.1-base checkpoint with random weights, to time the architecture without the real ones."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .server import PACK, find_comfyui

FREE_BYTES = 4_000_000_000
UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
AUTOENCODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def draw_weights(name: str, weights: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Fill weights in place with a variance of 1 / fan-in, so that activations neither vanish nor overflow in fp16."""
    total = sum(weight.numel() for weight in weights.values())
    with tqdm(total=total, desc=f"random {name}", unit="weight", unit_scale=True, mininterval=0.5) as bar:
        for key, weight in weights.items():
            if not weight.is_floating_point():
                continue
            if "logit_scale" in key:
                weight.fill_(4.6055)
            elif weight.ndim <= 1:
                weight.fill_(1.0 if key.endswith("weight") else 0.0)
            elif "embedding" in key:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            bar.update(weight.numel())
    return weights


def build_weights(seed: int) -> dict[str, torch.Tensor]:
    """UNet, text encoder and autoencoder in fp16 under the keys of the published checkpoint (LDM layout)."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.supported_models
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.text_encoders.sd2_clip import SD2ClipModel

    generator = torch.Generator().manual_seed(seed)
    config = comfy.supported_models.SD20(UNET)
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model({}, "", device="cpu")
    draw_weights("UNet", model.diffusion_model.state_dict(), generator)
    text_encoder = SD2ClipModel(device="cpu", dtype=torch.float16).state_dict()
    autoencoder = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4).half().state_dict()
    return model.state_dict_for_saving(
        draw_weights("text encoder", text_encoder, generator), draw_weights("autoencoder", autoencoder, generator), None
    )


def write_checkpoint(out: Path, seed: int = 0) -> None:
    """Write the checkpoint (2.6 GB) in one go: it is there whole or not at all."""
    import safetensors.torch

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    metadata = {"modelspec.title": "SD-2.1-base architecture, random weights", "modelspec.architecture": "sd2.1-base"}
    try:
        with torch.no_grad():
            weights = {key: weight.contiguous() for key, weight in build_weights(seed).items()}
        print(f"Writing {sum(weight.nbytes for weight in weights.values()) / 1e9:.1f} GB to {out} ...", flush=True)
        safetensors.torch.save_file(weights, partial, metadata=metadata)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def run_writer(comfyui: Path, out: Path, seed: int = 0) -> None:
    """Write the checkpoint in a process of its own, whose memory is free again afterwards.

    Raises RuntimeError when that process fails.
    """
    paths = [str(comfyui), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"{__package__}.fullsize", str(out.resolve()), "--seed", str(seed)]
    done = subprocess.run(command, cwd=PACK, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    if done.returncode:
        raise RuntimeError(f"The full-size checkpoint could not be written to {out}; see the message above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the file to write, *.safetensors")
    parser.add_argument("--comfyui", help="folder of a ComfyUI (default: COMFYUI_PATH)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if importlib.util.find_spec("comfy") is None:
        run_writer(find_comfyui(arguments.comfyui), arguments.out, arguments.seed)
    else:
        write_checkpoint(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
