"""LoCon with a Tucker decomposition: dW = alpha / r * G x1 B x2 A^T, a LoRA of a convolution whose kernel is in a core G.

lora_up B (out, r, 1, 1), lora_mid G (r, r, k, k), lora_down A (r, in, 1, 1) (Yeh et al. 2023, arXiv 2309.14859, section 3.1).
The core and lora_down together are one lora_down of the same rank, so the change is an exact LoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts
from library.formats.low_rank import LowRank


def low_rank(parts: Parts) -> LowRank:
    """The same change as a plain LoRA, with down (r, in, k, k) in float32."""
    like = torch.empty(0, dtype=torch.float32, device="meta")
    rank = parts.raw("lora_down.weight").shape[0]
    return LowRank(parts.raw("lora_up.weight"), _down(parts, like), parts.scale(rank) * rank)


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    down = _down(parts, weight)
    change = parts.matrix("lora_up.weight", weight) @ down.flatten(1)
    return parts.shaped(change * parts.scale(len(down)), weight)


def _down(parts: Parts, like: Tensor) -> Tensor:
    """The core times lora_down: (r, in, k, k)."""
    return torch.einsum("rs...,si->ri...", parts.tensor("lora_mid.weight", like), parts.matrix("lora_down.weight", like))


def matrix_shape(parts: Parts) -> tuple[int, int]:
    return low_rank(parts).matrix_shape


LOCON = Kind(
    "LoCon with Tucker decomposition",
    ("lora_mid.weight",),
    ("lora_up.weight", "lora_down.weight"),
    weight_change,
    low_rank=low_rank,
    matrix_shape=matrix_shape,
)
