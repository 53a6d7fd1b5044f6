"""A VAE that works through each image in horizontal slices: same image, less memory at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def slice_vae(vae: nn.Module, slices: int) -> None:
    """From now on each 3x3 convolution of `vae` computes its output in `slices` parts from top to bottom.

    Convolutions are what needs the most working memory. A part also reads the rows next to it, so nothing changes but rounding.
    """
    convolutions: list[Any] = [module for module in vae.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        if (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1)):
            module.forward = _Sliced(module, slices)


class _Sliced:
    def __init__(self, convolution: nn.Conv2d, slices: int) -> None:
        self.convolution, self.slices = convolution, slices

    def __call__(self, values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        weight, bias, height = self.convolution.weight, self.convolution.bias, values.shape[2]
        starts = [height * part // self.slices for part in range(self.slices + 1)]
        parts = []
        for start, end in pairwise(starts):
            if start == end:
                continue  # fewer rows than slices
            rows = values[:, :, max(start - 1, 0) : min(end + 1, height)]
            edges = (1, 1, int(start == 0), int(end == height))  # left, right, top, bottom
            parts.append(F.conv2d(F.pad(rows, edges), weight, bias))
        return torch.cat(parts, dim=2)
