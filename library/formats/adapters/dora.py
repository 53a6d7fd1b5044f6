"""DoRA: W' = m * (W + dW) / ||W + dW||, the size of a weight's rows or columns apart from their direction.

Liu et al. 2024 (arXiv 2402.09353), on top of the change dW of any kind. m is one number a row (an output): dora_scale
(out, 1[, 1, 1]) or peft's lora_magnitude_vector of any shape; or one a column (an input): dora_scale (1, in[, 1, 1]). The norm is
over the other dimensions. At another strength than 1, the whole W' - W is multiplied by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Parts

NAMES = ("dora_scale", "lora_magnitude_vector")


def is_dora(parts: Parts) -> bool:
    return any(name in parts for name in NAMES)


def decomposed_change(parts: Parts, change: Tensor, weight: Tensor) -> Tensor:
    """W' - W. change: dW, in the shape and dtype of `weight`."""
    axis, magnitude = _magnitude(parts, weight)
    changed = weight + change
    others = [dim for dim in range(weight.dim()) if dim != axis]
    norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    ratio = magnitude.view(norm.shape) / norm
    return changed * torch.where(norm > 0, ratio, 1.0) - weight


def _magnitude(parts: Parts, weight: Tensor) -> tuple[int, Tensor]:
    """The axis that the magnitudes belong to (0 outputs, 1 inputs), and the magnitudes."""
    if weight.dim() < 2:
        raise parts.misfit(weight)
    if "dora_scale" not in parts:
        axis, magnitude = 0, parts.tensor("lora_magnitude_vector", weight)
    else:
        magnitude = parts.tensor("dora_scale", weight)
        axis = 1 if magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1] else 0
    if magnitude.numel() != weight.shape[axis]:
        raise parts.misfit(weight)
    return axis, magnitude
