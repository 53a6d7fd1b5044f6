"""Where the layers that LoRAs change lie in a checkpoint's file (CompVis layout), by LoRA name.

`lora_unet_down_blocks_0_attentions_0_proj_in`, say, is `model.diffusion_model.input_blocks.1.1.proj_in.weight`. LoRA names are
paths with underscores: those of Diffusers, which follow from the one table of names in `names.py`, or for the U-Net of SDXL those
of the file itself. OpenCLIP holds query, key and value of a layer as one matrix, of which each LoRA module changes a third, and
its projection as the transpose of a layer's weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.formats.compvis import SingleFileNames
from library.formats.families import SD1, family_of_checkpoint
from library.formats.names import PROJECTION, UNET_PREFIX, is_transposed

Shapes = Mapping[str, tuple[int, ...]]

# The layers that get a LoRA here, by their names in Diffusers. Outside of these blocks (conv_in, time_embedding, conv_out, ...)
# are none; LyCORIS' presets have some.
_UNET_LAYERS = re.compile(r"(?:down_blocks|mid_block|up_blocks)\..+\.weight")
_UNET_ATTENTION = re.compile(r".+\.attentions\..+\.weight")
_TEXT_LAYERS = re.compile(r"encoder\.layers\.\d+\.(?:self_attn|mlp)\.\w+\.weight")


@dataclass(frozen=True)
class Target:
    """Where the weight of one layer is: the tensor's key, or a third of the rows of the tensor (0 query, 1 key, 2 value).

    is_transposed: whether the tensor's rows are the layer's inputs.
    """

    key: str
    third: int | None = None
    is_transposed: bool = False

    def rows(self, count: int) -> slice:
        """The rows of the tensor, which has `count` of them, that belong to the layer."""
        if self.third is None:
            return slice(0, count)
        return slice(self.third * count // 3, (self.third + 1) * count // 3)

    def weight(self, tensor: Tensor) -> Tensor:
        """The layer's weight, which is in this tensor of the file."""
        return tensor.T if self.is_transposed else tensor[self.rows(len(tensor))]


def lora_targets(shapes: Shapes, with_convolutions: bool = True) -> dict[str, Target]:
    """LoRA name -> target, of all layers that the trainer can give a LoRA, in the order of the file.

    with_convolutions: also those of residual blocks and samplers, which get one with `conv_dim` alone.
    """
    unet = _UNET_LAYERS if with_convolutions else _UNET_ATTENTION
    return {
        lora_name: target
        for part, name, lora_name, target in _targets(shapes, ".weight")
        if len(shapes[target.key]) > 1 and (unet if part == "unet" else _TEXT_LAYERS).fullmatch(name)
    }


def weight_targets(shapes: Shapes) -> dict[str, Target]:
    """LoRA name -> target, of the weights of all layers, norms included: files of other programs may change any of them."""
    return {lora_name: target for _, _, lora_name, target in _targets(shapes, ".weight")}


def bias_targets(shapes: Shapes) -> dict[str, Target]:
    """LoRA name -> target, of the biases of all layers."""
    return {lora_name: target for _, _, lora_name, target in _targets(shapes, ".bias")}


def _targets(shapes: Shapes, ending: str) -> Iterator[tuple[str, str, str, Target]]:
    """(part, Diffusers name, LoRA name, target) of the tensors whose Diffusers names end so."""
    family = family_of_checkpoint(shapes) or SD1
    names = SingleFileNames(shapes, family.layout)
    for key, shape in shapes.items():
        in_parts = names.to_parts(key, torch.empty(shape, device="meta"))
        for third, (part, name, _) in enumerate(in_parts):
            if part not in family.lora_prefixes or not name.endswith(ending):
                continue
            path = key.removeprefix(UNET_PREFIX) if part == "unet" and family.loras_name_checkpoint_paths else name
            inside = path.removesuffix(ending).replace(".", "_")
            if part != "unet" and inside != PROJECTION:
                inside = f"text_model_{inside}"
            target = Target(key, third if len(in_parts) == 3 else None, is_transposed(key))
            yield part, name, f"{family.lora_prefixes[part]}{inside}", target
