"""Norm layers (LayerNorm, GroupNorm): dW and db are in the file as they are, w_norm and b_norm (channels,)."""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    if "w_norm" not in parts:
        return torch.zeros(weight.shape, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device)
    return parts.shaped(parts.tensor("w_norm", weight), weight)


NORM = Kind("norm difference", ("w_norm", "b_norm"), (), weight_change)
