"""--fp8_base: the frozen model's large weights in 8 bits each, unpacked layer by layer where they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


class Unpacked(nn.Module):
    """A weight (out, ...) kept as float8_e4m3fn, with one factor a row that makes its largest number the format's largest.

    Without the factor most numbers of Stable Diffusion's weights, around 0.02, fall below 2**-6, where the format loses digits.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        largest = weight.detach().float().abs().flatten(1).amax(dim=1).clamp(min=1e-12)
        self.dtype = weight.dtype
        self.register_buffer("scale", (largest / LARGEST).view(-1, *[1] * (weight.ndim - 1)), persistent=False)

    def forward(self, packed: Tensor) -> Tensor:
        return (packed.to(self.scale.dtype) * self.scale).to(self.dtype)

    def pack(self, weight: Tensor) -> Tensor:
        return (weight / self.scale).to(FP8)


@torch.no_grad()
def store_as_fp8(model: nn.Module) -> int:
    """Keep the weights of linear and convolution layers in 8 bits; biases, norms and embeddings stay. Returns the bytes saved.

    `layer.weight` still gives the weight in its own format, so whatever reads it goes on working. Layers with trainable weights
    are left alone.
    """
    saved = 0
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not layer.weight.requires_grad and not parametrize.is_parametrized(layer):
            weight, unpacked = layer.weight, Unpacked(layer.weight)
            parametrize.register_parametrization(layer, "weight", unpacked, unsafe=True)
            packed = nn.Parameter(unpacked.pack(weight), requires_grad=False)
            layer.parametrizations.weight.original = packed  # torch would not let a parametrization change the type by itself
            saved += weight.nbytes - packed.nbytes - unpacked.scale.nbytes
    return saved
