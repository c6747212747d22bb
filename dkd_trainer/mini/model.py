"""The mini SD-2.1's trainable parts, built from ComfyUI's own modules with fresh weights."""

import torch
from torch import nn

from ..host import register_mini


def build_unet() -> nn.Module:
    """ComfyUI's UNetModel in SD-2.1's topology, 32 channels wide; starts as the zero prediction."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    mini = register_mini()
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=mini.MODEL_CHANNELS,
        num_res_blocks=[2] * 4,
        channel_mult=[1, 2, 4, 4],
        num_heads=-1,
        num_head_channels=mini.HEAD_CHANNELS,
        use_spatial_transformer=True,
        transformer_depth=[1] * 6 + [0] * 2,
        transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1,
        use_linear_in_transformer=True,
        context_dim=mini.TEXT_WIDTH,
        adm_in_channels=None,
        legacy=False,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    start_weights(unet)
    zero = [m.out_layers[3] for m in unet.modules() if type(m).__name__ == "ResBlock"]
    zero += [m.proj_out for m in unet.modules() if type(m).__name__ == "SpatialTransformer"]
    # ComfyUI reads v-prediction out of this bias; eps would do, but its errors grow 200-fold at SD's first step
    bias = unet.output_blocks[11][1].transformer_blocks[0].norm1.bias
    bias.data.copy_(0.15 * torch.tensor([1.0, -1.0]).repeat(len(bias) // 2))
    for module in [*zero, unet.out[2]]:  # residual branches and the output start at zero, as in SD
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return unet


def build_text_encoder() -> nn.Module:
    """ComfyUI's CLIP text model, 128 wide; `.transformer` holds the weights."""
    encoder = register_mini().MiniTextEncoder(dtype=torch.float32)
    start_weights(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return encoder.train().requires_grad_(True)


def start_weights(model: nn.Module) -> None:
    """PyTorch's default initialisation, which ComfyUI's modules skip."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def encode_text(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Prompt tokens (B, 77) -> context (B, 77, 128), the layer that ComfyUI's SD-2.1 reads.

    The host's own forward adds in place, which back-propagation does not survive; the layers are its own.
    """
    text = encoder.transformer.text_model
    x = text.embeddings(tokens, dtype=torch.float32)
    mask = torch.full((x.shape[1], x.shape[1]), -torch.finfo(x.dtype).max, device=x.device).triu_(1)
    for layer in text.encoder.layers[: encoder.layer_idx + 1]:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention=attend_masked)
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """Plain masked attention over (B, N, C), mask (N, N) added to the logits; on a CPU its backward beats SDPA's."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + mask.to(q.dtype)).softmax(-1, dtype=q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


class Tokens:
    """Captions as token rows (77,), each computed once."""

    def __init__(self):
        self.tokenizer = register_mini().MiniTokenizer()
        self.rows: dict[str, list[int]] = {}

    def __call__(self, captions: list[str]) -> torch.Tensor:
        for caption in captions:
            if caption not in self.rows:
                self.rows[caption] = [t for t, _ in self.tokenizer.tokenize_with_weights(caption)["h"][0]]
        return torch.tensor([self.rows[c] for c in captions])
