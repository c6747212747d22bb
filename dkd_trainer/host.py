"""The one place of the trainer that knows ComfyUI: it makes `comfy` importable and loads teachers as ComfyUI does."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from .diffusion import noise_levels

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_TEACHER = ROOT / "workflows" / "models" / "checkpoints" / "mini-sd21.safetensors"


def ensure_comfy(path: str | None, device: str = "auto") -> None:
    """Make `import comfy` work: start this program again with ComfyUI on PYTHONPATH when it is not there yet.

    With `device` cpu its text encoder and VAE stay there as well. Raises FileNotFoundError when no ComfyUI is given or
    found.
    """
    if importlib.util.find_spec("comfy") is None:
        path = path or os.environ.get("COMFYUI_PATH")
        if not path or not (Path(path) / "comfy" / "sd.py").is_file():
            raise FileNotFoundError(
                f"ComfyUI was not found at {path!r}; give its folder with --comfyui or COMFYUI_PATH"
            )
        paths = [str(Path(path).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu" or not torch.cuda.is_available()
    # latents are made once and kept; between kinds of device they differ by CUDA's TF32 convolutions alone
    comfy.cli_args.args.fp32_vae = True
    comfy.cli_args.args.use_pytorch_cross_attention = True


def register_mini():
    """Teach the stock loader the mini architecture from the same file that the pack uses; returns that module."""
    spec = importlib.util.spec_from_file_location("dha_mini_sd21", ROOT / "nodes" / "mini_sd21.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    return module


@contextmanager
def explain_shortage(advice: str) -> Iterator[None]:
    """Say what to do where a GPU's memory does not suffice; raises MemoryError in PyTorch's place."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{str(error).splitlines()[0]} Use a smaller {advice}") from error


class Teacher:
    """A Stable Diffusion 2.x checkpoint as ComfyUI loads it, frozen, with the few calls that training needs.

    Raises FileNotFoundError without it, ArchitectureError for one of another model, ValueError for one that takes more
    than noisy latents and a prompt.
    """

    def __init__(self, path: Path, device: torch.device):
        import comfy.model_management
        import comfy.sd

        from dha.checkpoint import fingerprint
        from dha.sites import SITES, check_text_to_image, read_architecture

        register_mini()
        if not path.is_file():
            raise FileNotFoundError(f"the teacher {path} does not exist; give an SD-2.x checkpoint with --teacher")
        self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
        # On a GPU with more free memory than the computer the UNet is there by now, and would leave it with the others.
        comfy.model_management.unload_all_models()
        self.device = device
        # In fp32, though the host may have rounded them to fp16 for a GPU: autocast lowers what is computed, not them.
        self.unet = self.model.model.diffusion_model.to(device).float().eval().requires_grad_(False)
        state = self.unet.state_dict()
        self.architecture, self.fingerprint = read_architecture(state), fingerprint(state)
        check_text_to_image(path.name, state)
        self.prediction = "v" if self.model.model.model_type.name == "V_PREDICTION" else "eps"
        self.head_width = self.attention(SITES[0]).dim_head

    def attention(self, site) -> torch.nn.Module:
        """The UNet's own self-attention module at a `dha.sites.Site`."""
        return self.unet.get_submodule(site.name)

    @torch.no_grad()
    def encode_picture(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> latents as the UNet sees them, (B, 4, H/8, W/8)."""
        latents = self.vae.encode(pictures.permute(0, 2, 3, 1))
        return self.model.model.process_latent_in(latents).float()

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the UNet sees them -> pictures (B, 3, H, W) in [0, 1]."""
        return self.vae.decode(self.model.model.process_latent_out(latents.cpu())).permute(0, 3, 1, 2).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Prompts as they are written, no weights in brackets -> contexts (B, 77, C); what is longer is cut off."""
        tokens = [self.clip.tokenize(prompt, disable_weights=True) for prompt in prompts]
        # the host lays the parts of a long prompt one after another: as parts, prompts are encoded in one pass
        parts = {name: [entry[name][0] for entry in tokens] for name in tokens[0]}
        return self.clip.encode_from_tokens(parts).float().unflatten(1, (len(prompts), -1))[0]

    @cached_property
    def text_fingerprint(self) -> str:
        """A short hash of the text encoder's weights: what cached contexts depend on."""
        return hash_weights(self.clip.cond_stage_model.state_dict())

    @cached_property
    def vae_fingerprint(self) -> str:
        """A short hash of the VAE's weights and the scale of its latents: what cached latents depend on."""
        scale = self.model.model.process_latent_in(torch.ones(1, 4, 1, 1))
        return hash_weights({**self.vae.first_stage_model.state_dict(), "latent scale": scale})

    @cached_property
    def unet_fingerprint(self) -> str:
        """A short hash of all weights of the UNet: what pictures drawn by the teacher depend on."""
        return hash_weights(self.unet.state_dict())

    def describe_weights(self) -> dict[str, str]:
        """The hashes of all three parts: what a training with this teacher depends on."""
        return {"unet": self.unet_fingerprint, "text": self.text_fingerprint, "vae": self.vae_fingerprint}

    def release(self) -> None:
        """Make room on the GPU: text encoder and VAE leave it until they are asked for again."""
        import comfy.model_management

        if self.device.type == "cuda":
            comfy.model_management.unload_all_models()

    def predict(
        self, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, options: dict | None = None
    ) -> torch.Tensor:
        """The UNet's raw prediction (B, 4, h, w) for noisy latents at timesteps t (B,); options carry patches."""
        options = {"sigmas": noise_levels(t), **(options or {})}  # what a student's grids are moved by
        return self.unet(latents, t.float(), context=context, transformer_options=options).float()


def hash_weights(state: Mapping[str, torch.Tensor]) -> str:
    """A short hash of named tensors in half precision, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
