"""IA3: dW = W * w, every output (or, with on_input, every input) of a layer scaled by 1 + w.

Liu et al. 2022 (arXiv 2205.05638), who train the factor; files hold what it is more than 1. weight: as many numbers as outputs
or inputs, in any shape. on_input: 0 or 1.
"""

from __future__ import annotations

from torch import Tensor

from library.formats.adapters.kind import Kind, Parts


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    axis = 1 if parts.number("on_input") else 0
    factors = parts.tensor("weight", weight).flatten()
    if len(factors) != weight.shape[axis]:
        raise parts.misfit(weight)
    return weight * factors.view([-1 if dim == axis else 1 for dim in range(weight.dim())])


IA3 = Kind("IA3", ("on_input",), ("weight",), weight_change, needs_weight=True)
