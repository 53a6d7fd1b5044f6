"""LoRA: dW = alpha / r * B A, with B (out, r) and A (r, in) (Hu et al. 2021, arXiv 2106.09685).

For a convolution, A is the kernel (r, in, k, k) and B one of 1 x 1 (LoCon). The algebra is in `library.formats.low_rank`.
"""

from __future__ import annotations

from torch import Tensor

from library.formats.adapters.kind import Kind, Parts
from library.formats.low_rank import LowRank


def low_rank(parts: Parts) -> LowRank:
    """The factors as the file has them."""
    up, down = parts.raw("lora_up.weight"), parts.raw("lora_down.weight")
    rank = down.shape[0]
    return LowRank(up, down, parts.scale(rank) * rank)


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    up, down = parts.matrix("lora_up.weight", weight), parts.matrix("lora_down.weight", weight)
    return parts.shaped(up @ down * parts.scale(len(down)), weight)


def matrix_shape(parts: Parts) -> tuple[int, int]:
    return low_rank(parts).matrix_shape


LORA = Kind("LoRA", ("lora_down.weight", "lora_up.weight"), (), weight_change, low_rank=low_rank, matrix_shape=matrix_shape)
