"""The names of weights: CompVis (one file, as in `model.safetensors`) <-> Diffusers (one folder a part). Pure functions.

Each direction is one table of module names for each part, made from the number of levels and layers. A weight's name is a module
name plus what follows it (`weight`, or the inside of a module that both layouts name alike).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
OLD_CLIP_PREFIX = "cond_stage_model.transformer."  # before transformers grouped the text model
OPEN_CLIP_PREFIX = "cond_stage_model.model."
FIRST_EMBEDDER = "conditioner.embedders.0."  # files with two text encoders number them
SECOND_EMBEDDER = "conditioner.embedders.1."

Table = dict[str, str]  # CompVis module name -> Diffusers module name

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # Diffusers before 0.17
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_TABLE = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
PROJECTION = "text_projection"  # OpenCLIP computes x P, a Linear layer x W^T: so W is P transposed
_VAE_1X1 = re.compile(r"(?:en|de)coder\.mid_block\.attentions\.0\.(?:to_q|to_k|to_v|to_out\.0)\.weight")


@dataclass(frozen=True)
class UNetLayout:
    """What of a U-Net's structure its CompVis names depend on."""

    levels: int
    layers: int
    attention: tuple[bool, ...]  # by level, from the outermost


def unet_layout(names: Iterable[str]) -> UNetLayout:
    """The layout of a U-Net from its weights' names, in either naming (CompVis ones without `model.diffusion_model.`)."""
    names = set(names)
    if "conv_in.weight" in names:
        levels = len(_numbers(names, r"down_blocks\.(\d+)\."))
        layers = len(_numbers(names, r"down_blocks\.0\.resnets\.(\d+)\."))
        attention = tuple(f"down_blocks.{level}.attentions.0.norm.weight" in names for level in range(levels))
        return UNetLayout(levels, layers, attention)
    samplers = sorted(map(int, _numbers(names, r"input_blocks\.(\d+)\.0\.op\.weight")))
    blocks = 1 + max(map(int, _numbers(names, r"input_blocks\.(\d+)\.")), default=0)
    layers = samplers[0] - 1 if samplers else blocks - 1
    levels = len(samplers) + 1
    attention = tuple(f"input_blocks.{1 + level * (layers + 1)}.1.norm.weight" in names for level in range(levels))
    return UNetLayout(levels, layers, attention)


def unet_table(layout: UNetLayout) -> Table:
    """U-Net module names, without `model.diffusion_model.`."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    _add(table, "middle_block.0", "mid_block.resnets.0", _RESNET)
    _add(table, "middle_block.2", "mid_block.resnets.1", _RESNET)
    for level in range(layout.levels):
        for layer in range(layout.layers):
            block = 1 + level * (layout.layers + 1) + layer
            _add(table, f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", _RESNET)
            table[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
        table[f"input_blocks.{(level + 1) * (layout.layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(layout.layers + 1):
            block = level * (layout.layers + 1) + layer
            _add(table, f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}", _RESNET)
            table[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
        # The upsampler comes last in its block: third where the level attends, else second.
        index = 2 if layout.attention[layout.levels - 1 - level] else 1
        table[f"output_blocks.{block}.{index}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def unet_paths(layout: UNetLayout) -> Table:
    """Diffusers path -> CompVis path of a U-Net's layers, and of the ResNets and samplers that hold some of them."""
    paths = reverse(unet_table(layout))
    for new, old in list(paths.items()):
        if new.endswith(".norm1"):
            paths[new.removesuffix(".norm1")] = old.removesuffix(".in_layers.0")
        elif new.endswith("samplers.0.conv"):
            paths[new.removesuffix(".conv")] = old.rpartition(".")[0]
    return paths


def vae_table(levels: int, layers: int) -> Table:
    """VAE module names, without `first_stage_model.`. CompVis numbers the decoder's levels from the image side."""
    table = {}
    for side in ("encoder", "decoder"):
        table[f"{side}.conv_in"] = f"{side}.conv_in"
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        table[f"{side}.conv_out"] = f"{side}.conv_out"
        _add(table, f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _VAE_RESNET)
        _add(table, f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _VAE_RESNET)
        _add(table, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
    for level in range(levels):
        up = levels - 1 - level
        for layer in range(layers):
            _add(table, f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}", _VAE_RESNET)
        for layer in range(layers + 1):
            _add(table, f"decoder.up.{level}.block.{layer}", f"decoder.up_blocks.{up}.resnets.{layer}", _VAE_RESNET)
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return table | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}


def vae_table_for(names: Iterable[str]) -> Table:
    """`vae_table` for a VAE with these weight names, in either naming."""
    names = list(names)
    levels = _numbers(names, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    layers = _numbers(names, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\.")
    return vae_table(len(levels), len(layers))


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its module replaced as the table says, or None if the table does not know it. The longest match counts."""
    end = len(name)
    while end > 0:
        if name[:end] in table:
            return table[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return None


def reverse(table: Table) -> Table:
    """Diffusers -> CompVis."""
    return {new: old for old, new in table.items()}


def vae_to_diffusers(name: str, value: Tensor) -> Tensor:
    """The attention of the VAE's middle is a 1x1 convolution (C, C, 1, 1) in CompVis files, linear (C, C) in Diffusers."""
    return value.flatten(1) if value.dim() > 1 and _VAE_1X1.fullmatch(name) else value


def vae_to_compvis(name: str, value: Tensor) -> Tensor:
    """The reverse of `vae_to_diffusers`; `name` is the Diffusers name in both."""
    return value[:, :, None, None] if _VAE_1X1.fullmatch(name) and value.dim() == 2 else value


def modern_vae_name(name: str) -> str:
    """The present name of a Diffusers VAE weight; before version 0.17 the attention's were `query`, `key`, ..."""
    head, _, last = name.rpartition(".")
    module, _, part = head.rpartition(".")
    return f"{module}.{_OLD_VAE_ATTENTION[part]}.{last}" if part in _OLD_VAE_ATTENTION else name


def open_clip_to_diffusers(name: str, value: Tensor) -> dict[str, Tensor]:
    """One OpenCLIP weight under its CLIP names (three for the joined query, key and value), empty if CLIP has no such weight.

    `name` comes without `cond_stage_model.model.`; so do text_projection and logit_scale, which SD does not use.
    """
    if (new := renamed(name, _OPEN_CLIP_TABLE)) is not None:
        return {new: value}
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if match is None:
        return {}
    layer, inside = f"encoder.layers.{match.group(1)}", match.group(2)
    if inside in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inside.rpartition("_")[2]
        thirds = zip(("q", "k", "v"), value.chunk(3), strict=False)
        return {f"{layer}.self_attn.{part}_proj.{kind}": third for part, third in thirds}
    new = renamed(inside, _OPEN_CLIP_LAYER)
    return {} if new is None else {f"{layer}.{new}": value}


def is_transposed(name: str) -> bool:
    """Whether a single file holds this weight transposed: only the bare projection, for `.weight` is a Linear layer's."""
    return name.rpartition(".")[2] == PROJECTION


def pooling_open_clip_to_diffusers(name: str, value: Tensor) -> dict[str, Tensor]:
    """The same as `open_clip_to_diffusers` for a text encoder whose projection is used."""
    if name in (PROJECTION, f"{PROJECTION}.weight"):
        return {f"{PROJECTION}.weight": value.T.contiguous() if is_transposed(name) else value}
    return open_clip_to_diffusers(name, value)


def pooling_clip_to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `pooling_open_clip_to_diffusers`; the projection becomes a bare matrix."""
    text = {name: value for name, value in weights.items() if not name.startswith(PROJECTION)}
    return clip_to_open_clip(text) | {PROJECTION: weights[f"{PROJECTION}.weight"].T.contiguous()}


def clip_to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP weights (names without `text_model.`) under OpenCLIP's names, query, key and value joined."""
    names, layer_names = reverse(_OPEN_CLIP_TABLE), reverse(_OPEN_CLIP_LAYER)
    result = {}
    for name, value in weights.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            result[_required(name, names)] = value
            continue
        layer, inside = f"transformer.resblocks.{match.group(1)}", match.group(2)
        if joined := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", inside):
            if joined.group(1) == "q":
                parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                result[f"{layer}.attn.in_proj_{joined.group(2)}"] = torch.cat(parts)
        else:
            result[f"{layer}.{_required(inside, layer_names)}"] = value
    return result


def open_clip_layers(names: Iterable[str]) -> int:
    """How many layers an OpenCLIP text encoder has by its weights' names (with any prefix)."""
    found = (re.search(r"transformer\.resblocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def unet_to_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """U-Net weights under their CompVis names, without `model.diffusion_model.`."""
    table = reverse(unet_table(unet_layout(weights)))
    return {_required(name, table): value for name, value in weights.items()}


def vae_to_compvis_all(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE weights under their CompVis names and shapes, without `first_stage_model.`."""
    table = reverse(vae_table_for(weights))
    return {_required(name, table): vae_to_compvis(name, value) for name, value in weights.items()}


def _numbers(names: Iterable[str], pattern: str) -> set[str]:
    """The different numbers that stand at the pattern's group, at the start of the names."""
    return {match.group(1) for name in names if (match := re.match(pattern, name))}


def _required(name: str, table: Mapping[str, str]) -> str:
    new = renamed(name, table)
    if new is None:
        raise KeyError(f"no other name is known for the weight {name}")
    return new


def _add(table: Table, old: str, new: str, inside: Mapping[str, str]) -> None:
    for old_part, new_part in inside.items():
        table[f"{old}.{old_part}"] = f"{new}.{new_part}"
