"""OFT: W' = s * diag(R1, ..., Rn)^T W, the outputs of a layer turned in blocks by orthogonal matrices.

Qiu et al. 2023 (arXiv 2306.07280): R = (I + Q) (I - Q)^-1 with the skew-symmetric Q = P - P^T (Cayley). oft_blocks P (n, b, b)
with n b outputs; oft_diag: R itself, as early LyCORIS wrote it. alpha is no strength here but bounds the norm of all Q by
alpha * out (constrained OFT); 0 or none: no bound. rescale s: (out, 1[, 1, 1]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    turns = rotations(parts, weight) if "oft_blocks" in parts else parts.tensor("oft_diag", weight)
    if turns.dim() != 3 or turns.shape[0] * turns.shape[1] != len(weight):
        raise parts.misfit(weight)
    rows = weight.reshape(turns.shape[0], turns.shape[1], -1)
    return rescaled(parts, (turns.mT @ rows).view(weight.shape)) - weight


def rotations(parts: Parts, weight: Tensor) -> Tensor:
    """The orthogonal matrices of oft_blocks, (..., b, b)."""
    blocks = parts.tensor("oft_blocks", weight)
    if blocks.shape[-1] != blocks.shape[-2]:
        raise parts.misfit(weight)
    skew = blocks - blocks.mT
    bound = (parts.number("alpha") or 0.0) * len(weight)
    size = skew.norm().item()
    if 0 < bound < size:
        skew = skew * (bound / size)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.linalg.solve(identity - skew, identity + skew)  # the two commute, so the side does not matter


def rescaled(parts: Parts, weight: Tensor) -> Tensor:
    """The outputs by their factors, if the file has some."""
    if "rescale" not in parts:
        return weight
    factors = parts.tensor("rescale", weight).flatten()
    if len(factors) != len(weight):
        raise parts.misfit(weight)
    return weight * factors.view(-1, *[1] * (weight.dim() - 1))


OFT = Kind("OFT", ("oft_blocks", "oft_diag"), ("rescale",), weight_change, needs_weight=True, dimensions=3)
