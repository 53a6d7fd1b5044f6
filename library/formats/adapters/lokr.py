"""LoKr: dW = alpha / r * W1 (x) W2, a Kronecker product, of which either side may be a low-rank product itself.

Edalati et al. 2022 (KronA, arXiv 2212.10650); for images Yeh et al. 2023 (LyCORIS, arXiv 2309.14859). W1 is (a, c), W2 is
(b, d[, k, k]), the layer (a b, c d[, k, k]). W2 may be lokr_w2_a (b, r) times lokr_w2_b (r, d * k * k), or these as (r, b) and
(r, d) about the Tucker core lokr_t2 (r, r, k, k). If neither side is low-rank there is no rank, and alpha has no meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts, tucker


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    change = torch.kron(_side(parts, "lokr_w1", weight), _side(parts, "lokr_w2", weight))
    return parts.shaped(change * _scale(parts), weight)


def _side(parts: Parts, name: str, weight: Tensor) -> Tensor:
    """(a, c), or (b, d * k * k)."""
    if name in parts:
        return parts.matrix(name, weight)
    first, second = parts.matrix(f"{name}_a", weight), parts.matrix(f"{name}_b", weight)
    if name == "lokr_w2" and "lokr_t2" in parts:
        return tucker(parts.tensor("lokr_t2", weight), first.T, second).flatten(1)
    return first @ second


def _scale(parts: Parts) -> float:
    pair = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)
    return parts.scale(len(parts.raw(pair))) if pair else 1.0


def matrix_shape(parts: Parts) -> tuple[int, int]:
    like = torch.empty(0, dtype=torch.float32)
    (a, c), (b, d) = _side(parts, "lokr_w1", like).shape, _side(parts, "lokr_w2", like).shape
    return a * b, c * d


LOKR = Kind(
    "LoKr",
    ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
    ("lokr_w1_b", "lokr_w2_b", "lokr_t2"),
    weight_change,
    matrix_shape=matrix_shape,
)
