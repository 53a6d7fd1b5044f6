"""The layouts in which LoRA files name their tensors, brought to one: kohya's `lora_unet_...` and `lora_te_...`.

| layout | a tensor's key |
|---|---|
| kohya | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` |
| Diffusers, peft | `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `base_model.model.mid_block...` |
| older Diffusers | `unet...attn1.processor.to_q_lora.down.weight`, `text_encoder...q_proj.lora_linear_layer.up.weight` |
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from library.errors import UserError
from networks.lora import FOREIGN_KEY, SIDES, lora_name

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
Factors = dict[str, dict[str, Tensor]]  # LoRA name -> "up", "down", perhaps "alpha"


def find_factors(tensors: Mapping[str, Tensor], source: str) -> tuple[Factors, dict[str, str]]:
    """The factors of every module by kohya name, and the paths that other layouts gave the modules.

    UserError, naming `source`, for what is no LoRA of Stable Diffusion 1.x or 2.x.
    """
    for mark, what in _FOREIGN.items():
        if key := next((key for key in tensors if mark in key), None):
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
