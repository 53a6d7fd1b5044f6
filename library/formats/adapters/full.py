"""Full differences: dW is in the file as it is, for any layer. diff: the shape of the weight; diff_b: of the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    if "diff" not in parts:  # only the bias changes
        return torch.zeros(weight.shape, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device)
    return parts.shaped(parts.tensor("diff", weight), weight)


def matrix_shape(parts: Parts) -> tuple[int, int] | None:
    if "diff" not in parts or parts.raw("diff").dim() < 2:
        return None
    return parts.raw("diff").shape[0], parts.raw("diff")[0].numel()


FULL = Kind("full difference", ("diff", "diff_b"), (), weight_change, matrix_shape=matrix_shape)
