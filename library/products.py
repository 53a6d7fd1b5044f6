"""Matrix products by the faster of the two libraries that torch has for them on a CPU: MKL, its choice for float32, or oneDNN.

On AMD's processors MKL leaves the AVX-512 units idle. There (EPYC, two cores, float32) oneDNN's products of a U-Net's layers take
0.6 to 0.9 times as long, and the U-Net's forward and backward pass 0.89 times at 256 and 512 px. Held to AVX2 both take the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight.T (in, out) + bias, for tensors that take no gradients: autograd does not see oneDNN's product."""
    if not by_onednn(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def with_transposed(weight: Tensor, columns: Tensor) -> Tensor:
    """weight.T (in, out) @ columns (out, n), as `linear`: each library in the order of factors that suits it."""
    return linear(columns.T, weight.T).T if by_onednn(weight) else weight.T @ columns


def by_onednn(weight: Tensor) -> bool:
    """Whether products with this weight are oneDNN's."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling() and onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Whether this processor multiplies float32 faster with oneDNN: a fact of the processor, so the same in every run on it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD")
