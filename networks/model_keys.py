"""Where the layers that LoRAs change lie in a Stable Diffusion file (CompVis layout). Pure functions on names, without torch.

`lora_unet_down_blocks_0_attentions_0_proj_in`, say, is `model.diffusion_model.input_blocks.1.1.proj_in.weight`. OpenCLIP, the
text encoder of SD 2, holds query, key and value of a layer as one matrix, of which each LoRA module changes a third.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNET = "model.diffusion_model."
CLIP = re.compile(r"cond_stage_model\.transformer\.(?:text_model\.)?encoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.weight")
OPEN_CLIP = "cond_stage_model.model."
OPEN_CLIP_LAYER = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.(.+)")

_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OPEN_CLIP = {
    "attn.out_proj.weight": ("self_attn_out_proj",),
    "attn.in_proj_weight": ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"),
    "mlp.c_fc.weight": ("mlp_fc1",),
    "mlp.c_proj.weight": ("mlp_fc2",),
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where the weight of one layer is: the tensor's key, or a third of the rows of the tensor (0 query, 1 key, 2 value)."""

    key: str
    third: int | None = None

    def rows(self, count: int) -> slice:
        """The rows of the tensor, which has `count` of them, that belong to the layer."""
        if self.third is None:
            return slice(0, count)
        return slice(self.third * count // 3, (self.third + 1) * count // 3)


def is_v2(names: Iterable[str]) -> bool | None:
    """Whether a file with these tensors is SD 2.x, told by its text encoder; None if it holds none."""
    text = [name for name in names if name.startswith("cond_stage_model.")]
    return any(name.startswith(OPEN_CLIP) for name in text) if text else None


def lora_places(shapes: Shapes) -> dict[str, Place]:
    """LoRA name -> place, of all layers that can have a LoRA, in the order of the file."""
    layers = _resnets_per_level(shapes)
    unused = f"{_last_open_clip_layer(shapes)}"  # SD 2 uses OpenCLIP up to the layer before its last
    places: dict[str, Place] = {}
    for key in shapes:
        if key.startswith(UNET) and key.endswith(".weight") and len(shapes[key]) > 1:
            name = unet_name(key.removeprefix(UNET).removesuffix(".weight"), layers)
            if name is not None:
                places[f"lora_unet_{name}"] = Place(key)
        elif match := CLIP.fullmatch(key):
            places[f"lora_te_text_model_encoder_layers_{'_'.join(match.groups())}"] = Place(key)
        elif (match := OPEN_CLIP_LAYER.fullmatch(key)) and match[1] != unused and match[2] in _OPEN_CLIP:
            parts = _OPEN_CLIP[match[2]]
            for third, part in enumerate(parts):
                name = f"lora_te_text_model_encoder_layers_{match[1]}_{part}"
                places[name] = Place(key, third if len(parts) == 3 else None)
    return places


def unet_name(module: str, layers: int) -> str | None:
    """The LoRA name, without `lora_unet_`, of a U-Net module with `layers` residual blocks a level. None: it gets no LoRA.

    >>> unet_name("input_blocks.3.0.op", 2), unet_name("output_blocks.5.2.conv", 2)
    ('down_blocks_0_downsamplers_0_conv', 'up_blocks_1_upsamplers_0_conv')
    """
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)|middle_block\.(\d)\.(.+)", module)
    if match is None:
        return None
    if match[5]:
        kind = "attentions_0" if match[5] == "1" else f"resnets_{int(match[5]) // 2}"
        return _inside(f"mid_block_{kind}", match[6])
    side, block, place, inside = match[1], int(match[2]), match[3], match[4]
    if side == "input" and block == 0:
        return None
    level, layer = divmod(block - 1 if side == "input" else block, layers + 1)
    start = f"{'down' if side == 'input' else 'up'}_blocks_{level}"
    if inside == "op":
        return f"{start}_downsamplers_0_conv"
    if inside == "conv":
        return f"{start}_upsamplers_0_conv"
    return _inside(f"{start}_{'attentions' if place == '1' else 'resnets'}_{layer}", inside)


def _inside(block: str, inside: str) -> str | None:
    if "resnets" in block:
        return f"{block}_{_RESNET[inside]}" if inside in _RESNET else None
    return f"{block}_{inside.replace('.', '_')}"


def _resnets_per_level(shapes: Shapes) -> int:
    """Residual blocks of a level: one less than the place of the first downsampler, or all if there is but one level."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(UNET)}input_blocks\.(\d+)\.0\.op\.weight", name))]
    if numbers:
        return min(numbers) - 1
    return max((int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(UNET)}input_blocks\.(\d+)\.", name))), default=1)


def _last_open_clip_layer(shapes: Shapes) -> int:
    return max((int(m[1]) for name in shapes if (m := OPEN_CLIP_LAYER.fullmatch(name))), default=-1)
