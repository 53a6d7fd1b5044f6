"""GLoRA: dW = alpha / r * (W A1 A2 + B1 B2), with A acting on the input of the layer and B beside it.

Chavan et al. 2023 (arXiv 2306.07967), without the paper's bias terms, as LyCORIS trains it. a1 (in, r), a2 (r, in), b1 (out, r),
b2 (r, in * k * k). Files of early LyCORIS have the pairs the other way round: a2 (in, r), a1 (r, in), b2 (out, r), b1 (r, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    a_first, a_second, b_first, b_second = (parts.matrix(f"{name}.weight", weight) for name in ("a1", "a2", "b1", "b2"))
    if not a_first.shape[1] == a_second.shape[0] == b_first.shape[1] == b_second.shape[0]:
        a_first, a_second, b_first, b_second = a_second, a_first, b_second, b_first
    through_input = torch.einsum("oi...,ir,rj->oj...", weight, a_first, a_second)
    beside = parts.shaped(b_first @ b_second, weight)
    return (through_input + beside) * parts.scale(len(a_second))


GLORA = Kind("GLoRA", ("a1.weight",), ("a2.weight", "b1.weight", "b2.weight"), weight_change, needs_weight=True)
