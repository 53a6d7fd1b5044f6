"""A small file of every kind of adapter, for the tests of the table in docs/networks.md."""

from __future__ import annotations

import torch
from torch import Tensor

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
NORM = "lora_unet_mid_block_attentions_0_norm"
TUCKER = "LoCon with Tucker decomposition"
GLORA_3X3 = "GLoRA, of a kernel"
# Kind, and after a comma what is special -> shapes of its tensors, for a layer of 64 in and out.
KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoRA": {"lora_up.weight": (64, 2), "lora_down.weight": (2, 64)},
    TUCKER: {"lora_up.weight": (64, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_down.weight": (2, 64, 1, 1)},
    "LoHa": {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 32)},
    "full difference": {"diff": (64, 64)},
    "GLoRA": {"a1.weight": (64, 2), "a2.weight": (2, 64), "b1.weight": (64, 2), "b2.weight": (2, 64)},
    GLORA_3X3: {"a1.weight": (64, 2), "a2.weight": (2, 64), "b1.weight": (64, 2), "b2.weight": (2, 576)},
    "IA3": {"weight": (64,), "on_input": ()},
    "OFT": {"oft_blocks": (8, 8, 8)},
    "BOFT": {"oft_blocks": (2, 8, 8, 8)},
    "LoRA with DoRA": {"lora_up.weight": (64, 2), "lora_down.weight": (2, 64), "dora_scale": (64, 1)},
    "LoRA with DoRA, by input": {"lora_up.weight": (64, 2), "lora_down.weight": (2, 64), "dora_scale": (1, 64)},
}


def title_of(kind: str) -> str:
    """As the tools name it."""
    return kind.partition(",")[0]


def layer_of(kind: str) -> str:
    """The layer that the file of this kind changes."""
    return CONV if kind in (TUCKER, GLORA_3X3) else LAYER


def random(shapes: dict[str, tuple[int, ...]], layer: str = LAYER) -> dict[str, Tensor]:
    """The tensors of one layer, by their names in a file."""
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{layer}.{name}": torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    if f"{layer}.on_input" in tensors:
        tensors[f"{layer}.on_input"] = torch.tensor(1)
    return tensors


def file_of(kind: str) -> dict[str, Tensor]:
    """The tensors of a file of this kind."""
    return random(KINDS[kind], layer_of(kind))
