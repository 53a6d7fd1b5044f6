"""LoHa: dW = alpha / r * (B1 A1) * (B2 A2), the product of two low-rank matrices number by number.

Hyeon-Woo, Ye-Bin and Oh 2021 (FedPara, arXiv 2108.06098); for images Yeh et al. 2023 (LyCORIS, arXiv 2309.14859). In files B1, A1
are hada_w1_a (out, r), hada_w1_b (r, in * k * k). With Tucker cores hada_t1, hada_t2 (r, r, k, k), both factors are (r, n).
"""

from __future__ import annotations

from torch import Tensor

from library.formats.adapters.kind import Kind, Parts, tucker


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    rank = len(parts.raw("hada_w1_b"))
    change = _factor(parts, "1", weight) * _factor(parts, "2", weight)
    return parts.shaped(change * parts.scale(rank), weight)


def _factor(parts: Parts, number: str, weight: Tensor) -> Tensor:
    """(out, in * k * k)."""
    first, second = parts.matrix(f"hada_w{number}_a", weight), parts.matrix(f"hada_w{number}_b", weight)
    if f"hada_t{number}" not in parts:
        return first @ second
    return tucker(parts.tensor(f"hada_t{number}", weight), first.T, second).flatten(1)


def matrix_shape(parts: Parts) -> tuple[int, int]:
    first, second = parts.raw("hada_w1_a"), parts.raw("hada_w1_b")
    if "hada_t1" in parts:  # (r, out) and (r, in), with the kernel in the core
        return first.shape[1], second[0].numel() * parts.raw("hada_t1")[0, 0].numel()
    return first.shape[0], second[0].numel()


LOHA = Kind(
    "LoHa",
    ("hada_w1_a",),
    ("hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    weight_change,
    matrix_shape=matrix_shape,
)
