"""Where the layers that LoRAs change lie in a checkpoint's file (CompVis layout), by LoRA name.

`lora_unet_down_blocks_0_attentions_0_proj_in`, say, is `model.diffusion_model.input_blocks.1.1.proj_in.weight`. LoRA names are
the layers' Diffusers names with underscores, so they follow from the one table of names in `names.py`. OpenCLIP, the text encoder
of SD 2, holds query, key and value of a layer as one matrix, of which each LoRA module changes a third.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from library.formats.compvis import SD1_LAYOUT, SD2_LAYOUT, SingleFileNames, layout_of

Shapes = Mapping[str, tuple[int, ...]]

_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# The layers outside of these blocks (conv_in, time_embedding, conv_out, ...) get no LoRA here; LyCORIS' presets have some.
_LAYERS = {
    "unet": re.compile(r"(?:down_blocks|mid_block|up_blocks)\..+\.weight"),
    "text_encoder": re.compile(r"encoder\.layers\.\d+\.(?:self_attn|mlp)\.\w+\.weight"),
}


@dataclass(frozen=True)
class Target:
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
    found = layout_of(names)
    return found is SD2_LAYOUT if found else None


def lora_targets(shapes: Shapes) -> dict[str, Target]:
    """LoRA name -> target, of all layers that the trainer can give a LoRA, in the order of the file."""
    return {
        lora_name: target
        for part, name, lora_name, target in _targets(shapes, ".weight")
        if len(shapes[target.key]) > 1 and _LAYERS[part].fullmatch(name)
    }


def weight_targets(shapes: Shapes) -> dict[str, Target]:
    """LoRA name -> target, of the weights of all layers, norms included: files of other programs may change any of them."""
    return {lora_name: target for _, _, lora_name, target in _targets(shapes, ".weight")}


def bias_targets(shapes: Shapes) -> dict[str, Target]:
    """LoRA name -> target, of the biases of all layers."""
    return {lora_name: target for _, _, lora_name, target in _targets(shapes, ".bias")}


def _targets(shapes: Shapes, ending: str) -> Iterator[tuple[str, str, str, Target]]:
    """(part, Diffusers name, LoRA name, target) of the tensors whose Diffusers names end so."""
    names = SingleFileNames(shapes, layout_of(shapes) or SD1_LAYOUT)
    for key, shape in shapes.items():
        placed = names.place(key, torch.empty(shape, device="meta"))
        for third, (part, name, _) in enumerate(placed):
            if part in _PREFIXES and name.endswith(ending):
                lora_name = _PREFIXES[part] + name.removesuffix(ending).replace(".", "_")
                yield part, name, lora_name, Target(key, third if len(placed) == 3 else None)
