"""All kinds of adapters, and the one value that stands for what a file holds about a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.adapters.boft import BOFT
from library.formats.adapters.dora import decomposed_change, is_dora
from library.formats.adapters.full import FULL
from library.formats.adapters.glora import GLORA
from library.formats.adapters.ia3 import IA3
from library.formats.adapters.kind import Kind, Parts
from library.formats.adapters.locon import LOCON
from library.formats.adapters.loha import LOHA
from library.formats.adapters.lokr import LOKR
from library.formats.adapters.lora import LORA
from library.formats.adapters.norm import NORM
from library.formats.adapters.oft import OFT
from library.formats.low_rank import LowRank, is_finite

# In the order of asking: lora_mid tells a LoCon that also has a LoRA's names; diff_b may stand beside any kind.
ADAPTERS = (LOCON, LORA, LOHA, LOKR, GLORA, IA3, OFT, BOFT, NORM, FULL)


@dataclass(frozen=True)
class Adapter:
    """What a file says about one layer: a change of its weight, of its bias, or of both."""

    kind: Kind
    parts: Parts

    @property
    def title(self) -> str:
        """The kind as people call it: `LoHa with DoRA`."""
        return f"{self.kind.name} with DoRA" if is_dora(self.parts) else self.kind.name

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the file."""
        return sum(value.nbytes for value in self.parts.tensors.values())

    @property
    def needs_weight(self) -> bool:
        """Whether the change depends on the numbers of the layer's weight; if not, its shape is enough."""
        return self.kind.needs_weight or is_dora(self.parts)

    @property
    def is_lora(self) -> bool:
        """Whether the change is an exact low-rank product."""
        return self.kind.low_rank is not None and not is_dora(self.parts)

    @property
    def changes_weight(self) -> bool:
        """Whether the layer's weight changes, and not its bias alone."""
        own = {NORM.name: "w_norm", FULL.name: "diff"}.get(self.kind.name)
        return own is None or own in self.parts

    @property
    def changes_matrix(self) -> bool:
        """Whether the weight that changes is a matrix or a kernel: that of a norm layer is not."""
        is_vector = self.kind is FULL and "diff" in self.parts and self.parts.raw("diff").dim() < 2
        return self.changes_weight and self.kind is not NORM and not is_vector

    @property
    def changes_bias(self) -> bool:
        return "diff_b" in self.parts or "b_norm" in self.parts

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """(out, in * k * k) of the layer, if the tensors determine it. Raises UserError if they do not fit each other."""
        try:
            return self.kind.matrix_shape(self.parts)
        except (RuntimeError, IndexError, ValueError) as error:  # torch: sizes that do not go together
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.parts.tensors.items())
            raise UserError(f"{self.parts.layer}: its tensors do not fit each other ({shapes}); fetch the file again") from error

    @property
    def unknown(self) -> tuple[str, ...]:
        """The names of tensors that have no part in the change."""
        return tuple(name for name in self.parts.tensors if name not in self.kind.names)

    def is_finite(self) -> bool:
        return all(is_finite(value) for value in self.parts.tensors.values())

    def weight_change(self, weight: Tensor) -> Tensor:
        """What is added to the layer's weight at full strength, in its shape and dtype.

        weight: the layer's, float32 or float64; on the meta device (a shape and a dtype) unless `needs_weight`.
        Raises UserError, naming the layer and the tensors, if one is missing or they do not fit.
        """
        try:
            change = self.kind.weight_change(self.parts, weight)
            return decomposed_change(self.parts, change, weight) if is_dora(self.parts) else change
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:  # torch: sizes that do not go together
            raise self.parts.misfit(weight) from error

    def bias_change(self, bias: Tensor) -> Tensor | None:
        """What is added to the layer's bias at full strength, in its shape and dtype; None if it stays."""
        name = next((name for name in ("diff_b", "b_norm") if name in self.parts), None)
        return self.parts.shaped(self.parts.tensor(name, bias), bias) if name else None

    def low_rank(self) -> LowRank | None:
        """The exact change as a LoRA, if the kind has that form."""
        return self.kind.low_rank(self.parts) if self.kind.low_rank and self.is_lora else None


def find_adapter(layer: str, tensors: Mapping[str, Tensor]) -> Adapter | None:
    """The adapter that these tensors of a layer are, recognised by their names; None if they are of no known kind.

    tensors: by the name that follows the layer's, such as `lora_down.weight`, `hada_w1_a` or `alpha`.
    """
    kind = next((kind for kind in ADAPTERS if kind.describes(tensors)), None)
    return Adapter(kind, Parts(layer, tensors)) if kind else None
