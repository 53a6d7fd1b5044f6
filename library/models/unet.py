"""The U-Net: its configuration, given or read from the shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.imports import import_model_libraries
from library.models.family import Config, Shapes
from library.models.modules import count_indices

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LATENT_CHANNELS = 4
SIZES = 6  # elements of the size conditioning: original height, width; crop top, left; target height, width
SIZE_WIDTH = 256  # sinusoids for each element


def unet_config(
    channels: tuple[int, ...],
    *,
    context_width: int,
    heads: int | None = 8,
    sample_size: int = 64,
    linear_projection: bool = False,
    upcast_attention: bool = False,
    layers: int = 2,
    attention: tuple[bool, ...] | None = None,
    middle: str | None = "UNetMidBlock2DCrossAttn",
    depths: Mapping[str, Any] | None = None,
    vector_width: int | None = None,
) -> Config:
    """Diffusers' configuration of a U-Net with these channels per level.

    `attention`: which levels have it (None: all but the last). The number of heads cannot be read from the weights; None: one
    for each 64 channels. (Diffusers calls the number of heads `attention_head_dim`.) `depths`: transformer blocks, as
    `transformer_depths` gives them; None: one everywhere. `vector_width`: of the vector added to the time embedding, if any.
    """
    attention = attention or (True,) * (len(channels) - 1) + (False,)
    config = {
        "sample_size": sample_size,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "mid_block_type": middle,
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "cross_attention_dim": context_width,
        "attention_head_dim": [max(1, width // 64) for width in channels] if heads is None else heads,
        "use_linear_projection": linear_projection,
        "upcast_attention": upcast_attention,
    }
    if depths:
        config |= depths
    if vector_width is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": vector_width,
        }
    return config


def read_unet_config(shapes: Shapes, *, heads: int | None = 8, sample_size: int = 64, upcast_attention: bool = False) -> Config:
    """The configuration of the U-Net with weights of these Diffusers names and shapes. They do not show the other arguments."""
    levels = count_indices(shapes, r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    layers = count_indices(shapes, r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight")
    attention = tuple(f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in range(levels))
    first = next(iter([name for name in shapes if name.endswith("proj_in.weight")])).removesuffix("proj_in.weight")
    vector = shapes.get("add_embedding.linear_1.weight")
    return unet_config(
        tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)),
        context_width=shapes[first + "transformer_blocks.0.attn2.to_k.weight"][1],
        heads=heads,
        sample_size=sample_size,
        upcast_attention=upcast_attention,
        layers=layers,
        attention=attention,
        middle=_middle_block(shapes),
        linear_projection=len(shapes[first + "proj_in.weight"]) == 2,
        depths=transformer_depths(shapes, levels, layers),
        vector_width=vector[1] if vector else None,
    )


def _middle_block(shapes: Shapes) -> str | None:
    if "mid_block.attentions.0.proj_in.weight" in shapes:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(name.startswith("mid_block.") for name in shapes) else None


def transformer_depths(shapes: Shapes, levels: int, layers: int) -> Config | None:
    """Transformer blocks by level, as Diffusers' configuration has them; None where it is one everywhere.

    Distilled models have other depths on the way up than on the way down, and within a level.
    """

    def depth(path: str) -> int:
        found = count_indices(shapes, rf"{path}\.transformer_blocks\.(\d+)\.attn1\.to_q\.weight")
        return max(1, found)  # a level without attention has none; its depth is not used

    down = [[depth(rf"down_blocks\.{level}\.attentions\.{n}") for n in range(layers)] for level in range(levels)]
    up = [[depth(rf"up_blocks\.{level}\.attentions\.{n}") for n in range(layers + 1)] for level in range(levels)]
    middle = depth(r"mid_block\.attentions\.0")
    if {middle, *sum(down, []), *sum(up, [])} == {1}:
        return None
    is_even = all(len(set(level)) == 1 for level in down) and (middle == down[-1][0] or _middle_block(shapes) is None)
    if is_even and all(set(level) == {mirror[0]} for level, mirror in zip(up, reversed(down), strict=True)):
        return {"transformer_layers_per_block": [level[0] for level in down]}
    return {"transformer_layers_per_block": _short(down), "reverse_transformer_layers_per_block": _short(up)}


def _short(depths: Sequence[Sequence[int]]) -> list[Any]:
    return [level[0] if len(set(level)) == 1 else list(level) for level in depths]


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net of this Diffusers configuration on the meta device: shapes only, no memory, no random numbers."""
    import_model_libraries()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))
