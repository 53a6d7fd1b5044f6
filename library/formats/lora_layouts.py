"""The layouts in which LoRA files name their tensors, brought to one: kohya's `lora_unet_...` and `lora_te_...`.

| layout | a tensor's key |
|---|---|
| kohya | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` |
| Diffusers, peft | `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `base_model.model.mid_block...` |
| older Diffusers | `unet...attn1.processor.to_q_lora.down.weight`, `text_encoder...q_proj.lora_linear_layer.up.weight` |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.foreign import instead_of_a_lora

KOHYA = ("lora_te_", "lora_unet_")
Factors = dict[str, dict[str, Tensor]]  # LoRA name -> "up", "down", perhaps "alpha"

# `...to_q.lora_A.weight` (peft, Diffusers), `...to_q.lora.down.weight`, `...q_proj.lora_linear_layer.down.weight`,
# `...attn1.processor.to_q_lora.down.weight` (older Diffusers)
FOREIGN_KEY = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<side>A|B)(?:\.\w+)?|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old_side>down|up))\.weight"
    r"|(?P<magnitude>.+?)\.lora_magnitude_vector(?:\.\w+)*|(?P<alpha>.+?)\.alpha"
)
SIDES = {"A": "lora_down.weight", "down": "lora_down.weight", "B": "lora_up.weight", "up": "lora_up.weight"}


def lora_name(path: str) -> str | None:
    """The LoRA name of a layer, given as any layout gives it, or None.

    >>> lora_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    if path.startswith(KOHYA):
        return path
    path = path.removeprefix("base_model.model.").replace(".processor.", ".")
    part, _, inside = path.partition(".")
    if part not in ("unet", "text_encoder"):
        part, inside = "unet" if path.startswith(("down_blocks.", "up_blocks.", "mid_block.")) else "text_encoder", path
    if part == "unet":
        prefix, inside = "lora_unet", re.sub(r"\.to_out$", ".to_out.0", inside)
    else:
        inside = inside.removeprefix("text_model.")
        prefix, inside = "lora_te_text_model", re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", inside)
    is_known = inside.startswith(("down_blocks.", "up_blocks.", "mid_block.") if part == "unet" else "encoder.layers.")
    return f"{prefix}_{inside.replace('.', '_')}" if is_known else None


def kohya_weights(weights: Mapping[str, Tensor], config: PeftConfig | None = None) -> dict[str, Tensor]:
    """The weights by the names that this module's own files have; names in no known layout stay as they are.

    config: where the alphas of Diffusers' and peft's layouts are written down. Without it they are the ranks.
    """
    result = {}
    for key, tensor in weights.items():
        match = None if key.startswith(KOHYA) else FOREIGN_KEY.fullmatch(key)
        path = match and (match["path"] or match["magnitude"] or match["alpha"])
        name = lora_name(path) if path else None
        if match is None or path is None or name is None:
            result[key] = tensor
        elif match["path"]:
            side = SIDES[match["side"] or match["old_side"]]
            result[f"{name}.{side}"] = tensor
            alpha = config.alpha(path, len(tensor)) if config and side == "lora_down.weight" else None
            if alpha is not None:
                result.setdefault(f"{name}.alpha", torch.tensor(alpha))
        else:
            result[f"{name}.alpha" if match["alpha"] else f"{name}.dora_scale"] = tensor if match["alpha"] else tensor.view(-1, 1)
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
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: the description of its alphas is not readable ({error})") from error

    def alpha(self, path: str, rank: int) -> float | None:
        """The alpha, as this module's files have it, of the layer at this path; None if nothing says it."""
        path = path.removeprefix("base_model.model.")
        part, _, inside = path.partition(".")
        config, inside = (self._parts[part], inside) if part in self._parts else (self._parts.get("", {}), path)
        alpha = config.get("lora_alpha")
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            if inside == pattern or inside.endswith(f".{pattern}"):
                alpha = own
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def find_factors(tensors: Mapping[str, Tensor], source: str) -> tuple[Factors, dict[str, str]]:
    """The factors of every module by kohya name, and the paths that other layouts gave the modules.

    UserError, naming `source`, for what is no LoRA of Stable Diffusion 1.x or 2.x.
    """
    if found := instead_of_a_lora(tensors):
        what, key = found
        raise UserError(f"{source} is {what} (it holds {key}); only LoRA files for Stable Diffusion 1.x and 2.x can be used")
    factors: Factors = {}
    paths = {}
    for key, tensor in tensors.items():
        path, side = _path_and_side(key)
        if not side:
            raise UserError(f"{source} is no plain LoRA: the tensor {key} is not part of one")
        name = lora_name(path)
        if name is None:
            raise UserError(f"{source}: the tensor {key} is named in no layout that is known (kohya, Diffusers, peft)")
        if side in factors.setdefault(name, {}):
            raise UserError(f"{source} holds the module {name} twice, the second time as {key}")
        factors[name][side] = tensor
        paths[name] = path
    return factors, paths


def _path_and_side(key: str) -> tuple[str, str]:
    """The module's path, as this file names it, and "up", "down" or "alpha"; that is empty if the key is not part of a LoRA."""
    for side in ("up", "down"):
        if key.endswith(f".lora_{side}.weight"):
            return key.removesuffix(f".lora_{side}.weight"), side
    match = FOREIGN_KEY.fullmatch(key)
    if match is None:
        return key, ""
    if match["path"]:
        return match["path"], SIDES[match["side"] or match["old_side"]].removeprefix("lora_").removesuffix(".weight")
    return match["alpha"] or key, "alpha" if match["alpha"] else ""
