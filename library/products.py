"""Matrix products by the faster of the two libraries that torch has for them on a CPU: MKL, its choice for float32, or oneDNN.

On AMD's processors MKL leaves the AVX-512 units idle. There (EPYC, two cores, float32) oneDNN's products of a U-Net's layers take
0.6 to 0.9 times as long; a U-Net's forward and backward pass takes 0.89 times as long at 256 px, 0.94 to 0.97 at 512 px. Held to
AVX2 both libraries take the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight.T (in, out) + bias, for tensors that take no gradients: autograd does not see oneDNN's product."""
    if torch.compiler.is_compiling() and _is_usual(weight):
        return _not_compiled(x, weight, bias)
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not by_onednn(weight) or not x.numel():
        return F.linear(x, weight, bias)
    # Detached: for more than two dimensions it is a view, and autograd lets no view from inside a function be changed in place.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "").detach()


# Inductor takes oneDNN's product for constant weights alone, and MKL's for others.
@torch.library.custom_op("lora_suite::linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _not_compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias)


@_not_compiled.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def with_transposed(weight: Tensor, columns: Tensor) -> Tensor:
    """weight.T (in, out) @ columns (out, n), as `linear`: each library in the order of factors that suits it."""
    return linear(columns.T, weight.T).T if by_onednn(weight) else weight.T @ columns


def with_few(x: Tensor, few: Tensor) -> Tensor:
    """x (n, k) @ few (k, r) for a small r. MKL takes two to three times as long with the long side in its rows."""
    return linear(x, few.T) if by_onednn(few) else (few.T @ x.T).T


def for_each(weight: Tensor, columns: Tensor) -> Tensor:
    """weight (m, k) @ columns (B, k, n) -> (B, m, n): one weight for all samples of a batch."""
    if by_onednn(weight) and len(columns):
        return torch.stack([linear(weight, sample.T) for sample in columns])
    return torch.bmm(weight.expand(len(columns), -1, -1), columns)


def summed(left: Tensor, right: Tensor) -> Tensor:
    """The sum over a batch of left (B, m, n) @ right.mT (B, n, k) -> (m, k)."""
    if by_onednn(left) and len(left):
        return torch.stack([linear(*pair) for pair in zip(left, right, strict=True)]).sum(0)
    return torch.bmm(left, right.mT).sum(0)


def by_onednn(weight: Tensor) -> bool:
    """Whether products with this weight are oneDNN's."""
    return _is_usual(weight) and not torch.compiler.is_compiling() and onednn_is_faster()


def _is_usual(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@cache
def onednn_is_faster() -> bool:
    """Whether this processor multiplies float32 faster with oneDNN: a fact of the processor, so the same in every run on it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD")
