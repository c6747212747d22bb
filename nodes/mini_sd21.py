"""Teach ComfyUI's stock checkpoint loader the mini SD-2.1: the same topology and keys, a tenth of the width."""

import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy import sd1_clip

MODEL_CHANNELS, HEAD_CHANNELS = 32, 32
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 4, 4
TEXT_CONFIG = {
    "hidden_act": "gelu",
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": TEXT_WIDTH * 4,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": TEXT_LAYERS,
    "projection_dim": TEXT_WIDTH,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "bos_token_id": 49406,
    "pad_token_id": 0,
    "model_type": "clip_text_model",
}


class MiniTextEncoder(sd1_clip.SDClipModel):
    """OpenCLIP-H's reading of a prompt (penultimate layer, zero padding), 128 wide."""

    def __init__(self, device="cpu", dtype=None, model_options={}, **_):
        super().__init__(
            device=device,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=dict(TEXT_CONFIG),
            dtype=dtype,
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            return_projected_pooled=True,
            model_options=model_options,
        )


class MiniTokens(sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}, **_):
        super().__init__(
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=TEXT_WIDTH,
            embedding_key="clip_h",
            tokenizer_data=tokenizer_data,
        )


class MiniTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data, clip_name="h", tokenizer=MiniTokens
        )


class MiniClip(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **kwargs):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options, clip_name="h", clip_model=MiniTextEncoder, **kwargs
        )


class MiniSD21(comfy.supported_models.SD20):
    """Detected by its context width; everything that is not listed here is SD-2.1's."""

    unet_config = {
        "context_dim": TEXT_WIDTH,
        "model_channels": MODEL_CHANNELS,
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": HEAD_CHANNELS, "attn_precision": torch.float32}

    def clip_target(self, state_dict={}):
        return comfy.supported_models_base.ClipTarget(MiniTokenizer, MiniClip)


def register() -> None:
    """Add the architecture to those the loader knows; calling it again changes nothing."""
    known = comfy.supported_models.models
    if not any(model.__name__ == MiniSD21.__name__ for model in known):
        known.append(MiniSD21)
