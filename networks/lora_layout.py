"""The layouts in which LoRA files name their tensors, brought to one: kohya's `lora_unet_...` and `lora_te_...`.

| layout | a tensor's key |
|---|---|
| kohya | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` |
| Diffusers, peft | `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `base_model.model.mid_block...` |
| older Diffusers | `unet.mid_block...attn1.processor.to_q_lora.down.weight`, `text_encoder...q_proj.lora_linear_layer.up.weight` |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# What a key's part gives away, by the first that is found.
_FOREIGN = {
    "model.diffusion_model.": "a whole model, not a LoRA",
    ".hada_": "a LoHa file (LyCORIS)",
    ".lokr_": "a LoKr file (LyCORIS)",
    ".dora_scale": "a DoRA file (LyCORIS)",
    ".lora_magnitude_vector": "a DoRA file",
    ".oft_": "an OFT file",
    ".on_input": "an IA3 file (LyCORIS)",
    ".lora_mid.": "a LoCon file with Tucker decomposition (LyCORIS)",
    ".diff": "a file with full differences (LyCORIS)",
    "lora_te1_": "a LoRA for SDXL",
    "lora_te2_": "a LoRA for SDXL",
    "text_encoder_2.": "a LoRA for SDXL",
    "lora_unet_input_blocks_": "a LoRA for SDXL",
    "lora_unet_double_blocks_": "a LoRA for Flux",
    "lora_unet_joint_blocks_": "a LoRA for SD 3",
    "transformer.": "a LoRA for another family of models",
    "down_blocks.0.resnets.0.conv1.weight": "a whole U-Net, not a LoRA",
    "string_to_param": "a textual inversion embedding, not a LoRA",
    "emb_params": "a textual inversion embedding, not a LoRA",
}
_KEY = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<side>down|up|A|B)(?:\.default)?|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old_side>down|up))\.weight"
)
_SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}
_TEXT = ("text_model.", "encoder.layers.")
_UNET = ("down_blocks.", "up_blocks.", "mid_block.")

Factors = dict[str, dict[str, Tensor]]  # LoRA name -> "up", "down", perhaps "alpha"


def find_factors(tensors: Mapping[str, Tensor], source: str) -> tuple[Factors, dict[str, str]]:
    """The factors of every module by kohya name, and the paths that other layouts gave the modules.

    ValueError, naming `source`, for what is no LoRA of Stable Diffusion 1.x or 2.x.
    """
    for mark, what in _FOREIGN.items():
        if key := next((key for key in tensors if mark in key), None):
            raise ValueError(f"{source} is {what} (it holds {key}); only LoRA files for Stable Diffusion 1.x and 2.x can be used")
    factors: Factors = {}
    paths = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            path, side = key.removesuffix(".alpha"), "alpha"
        elif match := _KEY.fullmatch(key):
            path, side = match["path"], _SIDES[match["side"] or match["old_side"]]
        else:
            raise ValueError(f"{source} is no plain LoRA: the tensor {key} is not part of one")
        name = lora_name(path)
        if name is None:
            raise ValueError(f"{source}: the tensor {key} is named in no layout that is known (kohya, Diffusers, peft)")
        if side in factors.setdefault(name, {}):
            raise ValueError(f"{source} holds the module {name} twice, the second time as {key}")
        factors[name][side] = tensor
        paths[name] = path
    return factors, paths


def lora_name(path: str) -> str | None:
    """The kohya name of a module named in any layout, or None.

    >>> lora_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    if path.startswith(("lora_te_", "lora_unet_")):
        return path
    path = path.removeprefix("base_model.model.")
    part, _, inside = path.partition(".")
    if part not in ("unet", "text_encoder"):
        part, inside = "unet" if path.startswith(_UNET) else "text_encoder", path
    inside = re.sub(r"\.processor\.", ".", inside)
    inside = re.sub(r"\.to_out$", ".to_out.0", inside)
    if part == "text_encoder" and inside.startswith(_TEXT):
        return f"lora_te_text_model_{inside.removeprefix('text_model.')}".replace(".", "_")
    return f"lora_unet_{inside}".replace(".", "_") if part == "unet" and inside.startswith(_UNET) else None


class PeftConfig:
    """The alphas that Diffusers and peft keep beside the tensors: in the file's metadata or in `adapter_config.json`."""

    def __init__(self, file: Path, metadata: Mapping[str, str]):
        self._parts: dict[str, dict] = {}
        beside = file.parent / "adapter_config.json"
        if "lora_adapter_metadata" in metadata:
            for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                part, _, name = key.partition(".")
                self._parts.setdefault(part, {})[name] = value
        elif file.stem == "adapter_model" and beside.is_file():
            self._parts[""] = json.loads(beside.read_text(encoding="utf-8"))
        for config in self._parts.values():
            if config.get("use_dora"):
                raise ValueError(f"{file} is a DoRA file; only LoRA files can be used")

    def alpha(self, path: str, rank: int) -> float | None:
        """The alpha of the module at this path, or None if nothing says it."""
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
