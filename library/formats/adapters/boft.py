"""BOFT: W' = s * B_m ... B_1 W, orthogonal matrices in the order of a fast Fourier transform's butterflies.

Liu et al. 2023 (arXiv 2311.06243). oft_blocks (m, n, b, b) with n b outputs gives the rotations of the m stages as in OFT. Stage
i turns blocks of b outputs, in which the two of a pair lie b / 2 * 2^i apart, so that m stages connect every output with many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.formats.adapters.kind import Kind, Parts
from library.formats.adapters.oft import rescaled, rotations


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    stages = rotations(parts, weight)
    blocks, size, outputs = stages.shape[1], stages.shape[2], len(weight)
    turned = weight.flatten(1)
    for number, turns in enumerate(stages):
        half = size // 2 * 2**number
        if blocks * size != outputs or outputs % (2 * half):
            raise parts.misfit(weight)
        order = torch.arange(outputs, device=weight.device).view(-1, 2, half).mT.flatten()
        mixed = turns @ turned[order].view(blocks, size, -1)
        turned = torch.empty_like(turned).index_copy_(0, order, mixed.flatten(0, 1))
    return rescaled(parts, turned.view(weight.shape)) - weight


BOFT = Kind("BOFT", ("oft_blocks",), ("rescale",), weight_change, needs_weight=True, dimensions=4)
