"""The layouts in which LoRA files name their tensors, brought to one: kohya's `lora_unet_...` and `lora_te_...`.

| layout | a tensor's key |
|---|---|
| kohya | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` |
| kohya with CompVis' blocks | `lora_unet_middle_block_1_proj_in.lora_down.weight`, `lora_te1_text_model_...` |
| Diffusers, peft | `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `base_model.model.mid_block...` |
| older Diffusers | `unet...attn1.processor.to_q_lora.down.weight`, `text_encoder...q_proj.lora_linear_layer.up.weight` |
| dotted | `unet.mid_block.attentions.0.proj_in.lora_down.weight`, or with `hada_w1_a` and others of LyCORIS |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.names import UNetLayout, unet_table

KOHYA = ("lora_te_", "lora_unet_")
_IN_UNET = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "conv_norm_out", "time_embedding")
# Prefixes of other programs, and kohya's. `lora_te1_` is Diffusers' own conversion, also for the one text encoder of SD 1.
_PREFIXES = {"lora_te1_": "lora_te_", "oft_unet_": "lora_unet_", "oft_te_": "lora_te_"} | {
    f"lycoris_{start}": f"lora_unet_{start}" for start in _IN_UNET
}

# `...to_q.lora_A.weight` (peft, Diffusers), `...to_q.lora.down.weight`, `...q_proj.lora_linear_layer.down.weight`,
# `...attn1.processor.to_q_lora.down.weight` (older Diffusers), `...to_q.lora_down.weight`
FOREIGN_KEY = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<side>A|B)(?:\.\w+)?\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old_side>down|up)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*"
    r"|\.(?P<tensor>lora_(?:down|up|mid)\.weight|hada_\w+|lokr_\w+|[ab][12]\.weight|oft_blocks|oft_diag|rescale|on_input"
    r"|diff|diff_b|w_norm|b_norm|dora_scale|alpha))"
)
SIDES = {"A": "lora_down.weight", "down": "lora_down.weight", "B": "lora_up.weight", "up": "lora_up.weight"}


def lora_name(path: str) -> str | None:
    """The LoRA name of a layer, given as any layout gives it, or None.

    >>> lora_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    path = next((kohya + path[len(other) :] for other, kohya in _PREFIXES.items() if path.startswith(other)), path)
    if path.startswith(KOHYA):
        return _with_diffusers_blocks(path)
    path = path.removeprefix("base_model.model.").replace(".processor.", ".")
    part, _, inside = path.partition(".")
    if part not in ("unet", "text_encoder"):
        part, inside = "unet" if path.startswith(_IN_UNET) else "text_encoder", path
    if part == "unet":
        prefix, inside = "lora_unet", re.sub(r"\.to_out$", ".to_out.0", inside)
    else:
        inside = inside.removeprefix("text_model.")
        prefix, inside = "lora_te_text_model", re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", inside)
    is_known = inside.startswith(_IN_UNET if part == "unet" else ("encoder.layers.", "final_layer_norm"))
    return f"{prefix}_{inside.replace('.', '_')}" if is_known else None


def _with_diffusers_blocks(name: str) -> str:
    """A kohya name, its U-Net block as Diffusers numbers it: `lora_unet_input_blocks_1_1_...` is of the first down block."""
    inside = name.removeprefix("lora_unet_")
    table = _block_names()
    end = len(inside)
    while end > 0 and inside != name:
        if inside[:end] in table:
            return f"lora_unet_{table[inside[:end]]}{inside[end:]}"
        end = inside.rfind("_", 0, end)
    return name


@cache
def _block_names() -> dict[str, str]:
    """CompVis' module names, with underscores, and Diffusers' for them, of the U-Net that SD 1.x and 2.x share."""
    table: dict[str, str] = {}
    for attention in ((True, True, True, False), (False,) * 4):  # upsamplers stand at another place where a level has none
        table |= unet_table(UNetLayout(4, 2, attention))
    return {compvis.replace(".", "_"): diffusers.replace(".", "_") for compvis, diffusers in table.items()}


def kohya_key(key: str) -> tuple[str, str, str] | None:
    """(path, LoRA name, tensor's name) of a key in any layout; None if no layout has it. The path is as the file names the layer.

    >>> kohya_key("unet.mid_block.attentions.0.proj_in.lora_A.weight")[1:]
    ('lora_unet_mid_block_attentions_0_proj_in', 'lora_down.weight')
    """
    if key.startswith((*KOHYA, *_PREFIXES)):
        path, _, tensor = key.partition(".")
        tensor = re.sub(r"^lora_magnitude_vector(\.\w+)*$", "dora_scale", tensor)
    elif match := FOREIGN_KEY.fullmatch(key):
        path = match["path"]
        tensor = match["tensor"] or ("dora_scale" if match["magnitude"] else SIDES[match["side"] or match["old_side"]])
    else:
        return None
    name = lora_name(path)
    return (path, name, tensor) if name and tensor else None


def kohya_weights(weights: Mapping[str, Tensor], config: PeftConfig | None = None) -> dict[str, Tensor]:
    """The weights by the names that this suite's own files have; names in no known layout stay as they are.

    config: where the alphas of Diffusers' and peft's layouts are written down. Without it they are the ranks.
    Raises UserError if two tensors get one name.
    """
    result: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in weights.items():
        path, name, inside = kohya_key(key) or ("", "", "")
        new = f"{name}.{inside}" if name else key
        if new in result:
            raise UserError(f"it holds {new} twice, the second time as {key}")
        result[new] = tensor.view(-1, 1) if "lora_magnitude_vector" in key and inside == "dora_scale" else tensor
        alpha = config.alpha(path, len(tensor)) if config and inside == "lora_down.weight" and len(tensor) else None
        if alpha is not None:
            alphas[f"{name}.alpha"] = alpha
    return result | {key: torch.tensor(alpha) for key, alpha in alphas.items() if key not in result}


def named_for(weights: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """The weights with other names of layers brought to those in `layers`, where that makes them known."""
    result = {}
    for key, tensor in weights.items():
        layer, dot, inside = key.partition(".")
        name = layer if layer in layers else lora_name(layer)
        result[f"{name if name in layers else layer}{dot}{inside}"] = tensor
    return result


class PeftConfig:
    """The alphas that Diffusers and peft keep beside the tensors: in the file's metadata or in `adapter_config.json`."""

    def __init__(self, file: Path, metadata: Mapping[str, str]):
        self._parts: dict[str, dict[str, Any]] = {}
        beside = file.parent / "adapter_config.json"
        try:
            if "lora_adapter_metadata" in metadata:
                for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                    part, _, name = key.partition(".")
                    self._parts.setdefault(part, {})[name] = value
            elif file.stem == "adapter_model" and beside.is_file():
                self._parts[""] = dict(json.loads(beside.read_text(encoding="utf-8")))
            for config in self._parts.values():
                config["alpha_pattern"] = {
                    _matcher(pattern): float(alpha) for pattern, alpha in (config.get("alpha_pattern") or {}).items()
                }
        except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise UserError(f"{file}: the description of its alphas is not readable ({error})") from error

    def alpha(self, path: str, rank: int) -> float | None:
        """The alpha, as this suite's files have it, of the layer at this path; None if nothing says it."""
        path = path.removeprefix("base_model.model.")
        part, _, inside = path.partition(".")
        config, inside = (self._parts[part], inside) if part in self._parts else (self._parts.get("", {}), path)
        own = (alpha for matcher, alpha in config.get("alpha_pattern", {}).items() if matcher.fullmatch(inside))
        alpha = next(own, config.get("lora_alpha"))
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _matcher(pattern: str) -> re.Pattern[str]:
    """peft's rule: a regular expression for the end of the path, from a dot on. The first that matches counts."""
    return re.compile(rf"(?:.*\.)?(?:{pattern})")
