"""The configuration of each part: of the full-size models, and read from the shapes of a checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

LATENT_CHANNELS = 4
SCALING_FACTOR = 0.18215  # makes the latents of the SD 1 and SD 2 VAE about unit variance


def unet_config(
    channels: tuple[int, ...],
    *,
    context_width: int,
    v2: bool,
    v_parameterization: bool = False,
    layers: int = 2,
    attention: tuple[bool, ...] | None = None,
    middle: bool = True,
    linear_projection: bool | None = None,
) -> Config:
    """Diffusers' configuration of a U-Net with these channels per level.

    `attention` says which levels attend (None: all but the last). The number of heads leaves no trace in the weights: SD 1 has
    8 on every level, SD 2 one for each 64 channels. (Diffusers calls the number of heads `attention_head_dim`.)
    """
    attention = attention or (True,) * (len(channels) - 1) + (False,)
    return {
        "sample_size": 96 if v2 and v_parameterization else 64,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "cross_attention_dim": context_width,
        "attention_head_dim": [max(1, width // 64) for width in channels] if v2 else 8,
        "use_linear_projection": v2 if linear_projection is None else linear_projection,
        "upcast_attention": v2,  # SD 2.1 overflows in fp16 without it; it changes nothing else
    }


def vae_config(channels: tuple[int, ...], *, layers: int = 2, middle_attention: bool = True) -> Config:
    """Diffusers' configuration of a VAE with these channels per level; each level but the last halves the picture."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "latent_channels": LATENT_CHANNELS,
        "mid_block_add_attention": middle_attention,
        "sample_size": 512,
        "scaling_factor": SCALING_FACTOR,
    }


def text_config(
    width: int, layers: int, *, v2: bool, inner_width: int | None = None, vocabulary: int = 49408, positions: int = 77
) -> Config:
    """transformers' configuration of a CLIP text encoder: one head for each 64 channels; OpenCLIP (SD 2) uses the exact GELU."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner_width or 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": "gelu" if v2 else "quick_gelu",
        "projection_dim": width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,  # transformers' own value; padding is done in text.py
    }


def sd15_configs() -> dict[str, Config]:
    """The full-size SD 1.5 as configurations `unet`, `vae` and `text_encoder`."""
    return {
        "unet": unet_config((320, 640, 1280, 1280), context_width=768, v2=False),
        "vae": vae_config((128, 256, 512, 512)),
        "text_encoder": text_config(768, 12, v2=False),
    }


def sd2_configs(v_parameterization: bool = True) -> dict[str, Config]:
    """The full-size SD 2.x; its text encoder has 23 of OpenCLIP's 24 layers."""
    return {
        "unet": unet_config((320, 640, 1280, 1280), context_width=1024, v2=True, v_parameterization=v_parameterization),
        "vae": vae_config((128, 256, 512, 512)),
        "text_encoder": text_config(1024, 23, v2=True),
    }


def read_unet_config(shapes: Shapes, *, v2: bool, v_parameterization: bool) -> Config:
    """The configuration of the U-Net whose weights have these Diffusers names and shapes."""
    levels = _count(shapes, r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    attention = tuple(f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in range(levels))
    attentions = [name[: -len("proj_in.weight")] for name in shapes if name.endswith("proj_in.weight")]
    first = attentions[0]
    return unet_config(
        tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)),
        context_width=shapes[first + "transformer_blocks.0.attn2.to_k.weight"][1],
        v2=v2,
        v_parameterization=v_parameterization,
        layers=_count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        attention=attention,
        middle=any(name.startswith("mid_block.") for name in shapes),
        linear_projection=len(shapes[first + "proj_in.weight"]) == 2,
    )


def read_vae_config(shapes: Shapes) -> Config:
    """The configuration of the VAE whose weights have these Diffusers names and shapes."""
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    return vae_config(
        tuple(shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)),
        layers=_count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        middle_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )


def read_text_config(shapes: Shapes, *, v2: bool) -> Config:
    """The configuration of the text encoder whose weights have these names (without `text_model.`) and shapes."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return text_config(
        width,
        _count(shapes, r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight"),
        v2=v2,
        inner_width=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        vocabulary=vocabulary,
        positions=shapes["embeddings.position_embedding.weight"][0],
    )


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers, from 0 on, stand at the pattern's group."""
    found = {int(match.group(1)) for name in shapes if (match := re.fullmatch(pattern, name))}
    return next(number for number in range(len(found) + 1) if number not in found)
