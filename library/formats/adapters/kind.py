"""What the kinds of adapters have in common: the tensors of one layer in a file, and how a kind turns them into a change.

A kind is a value, `Kind`, in a file of its own; `registry.py` lists them. Everything is a pure function of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.low_rank import CURE_OF_BROKEN, LowRank

# Names that may stand beside the tensors of any kind.
COMMON = ("alpha", "dora_scale", "lora_magnitude_vector", "diff_b", "b_norm")


@dataclass(frozen=True)
class Parts:
    """The tensors that a file holds for one layer. layer: its name in the file. tensors: by the name that follows it."""

    layer: str
    tensors: Mapping[str, Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """One tensor in the dtype of `like`, and on its device unless that is meta."""
        value = self.raw(name)
        if not value.is_floating_point():
            raise UserError(f"{self.layer}: the tensor {name} is {_plain(value.dtype)}, not of floating point")
        return value.to(like.dtype) if like.is_meta else value.to(like)

    def matrix(self, name: str, like: Tensor) -> Tensor:
        """One tensor with the dimensions behind the first as one: (r, in, k, k) becomes (r, in * k * k)."""
        return self.tensor(name, like).flatten(1)

    def raw(self, name: str) -> Tensor:
        """One tensor as the file has it. Raises UserError if the file lacks it."""
        if name not in self.tensors:
            raise UserError(f"{self.layer}: the tensor {name} is missing; the file is incomplete")
        return self.tensors[name]

    def number(self, name: str) -> float | None:
        """A tensor of one number, whatever its shape and dtype; None if the file lacks it."""
        if name not in self.tensors:
            return None
        value = self.tensors[name]
        if value.numel() != 1:
            raise UserError(f"{self.layer}: {name} is no single number but has the shape {tuple(value.shape)}")
        number = float(value)
        if not math.isfinite(number):
            raise UserError(f"{self.layer}: {name} is {number}, so the file is of no use; {CURE_OF_BROKEN}")
        return number

    def scale(self, rank: int) -> float:
        """alpha / rank; 1 if alpha is missing or 0."""
        alpha = self.number("alpha")
        return alpha / rank if alpha and rank else 1.0

    def shaped(self, change: Tensor, weight: Tensor) -> Tensor:
        """A change in the shape of the layer's weight. Raises UserError unless outputs and sizes agree."""
        if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
            raise self.misfit(weight)
        return change.reshape(weight.shape)

    def misfit(self, weight: Tensor) -> UserError:
        """The error for tensors that fit neither each other nor the layer."""
        found = ", ".join(f"{name} {_size(value)}" for name, value in self.tensors.items() if value.numel() > 1)
        return UserError(
            f"{self.layer}: {found} do not fit each other or the layer's weight of {_size(weight)}; "
            "is the file for another kind of model?"
        )


@dataclass(frozen=True)
class Kind:
    """One way to describe the change of a layer's weight.

    name: as people call it. marks: the tensors that tell it, any of them. others: what it reads beside them and COMMON.
    weight_change(parts, weight): the change at full strength, in the shape and dtype (float32 or float64) of `weight`.
    needs_weight: whether the change depends on the numbers of the weight; if not, `weight` may be on the meta device.
    low_rank(parts): the same change as an exact low-rank product, for kinds that are one.
    matrix_shape(parts): (out, in * k * k) of the layer, for kinds whose tensors determine it.
    dimensions: of the mark, where two kinds share its name.
    """

    name: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    weight_change: Callable[[Parts, Tensor], Tensor]
    needs_weight: bool = False
    low_rank: Callable[[Parts], LowRank] | None = None
    matrix_shape: Callable[[Parts], tuple[int, int] | None] = lambda parts: None
    dimensions: int | None = None

    def describes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors of a layer are of this kind."""
        return any(mark in tensors and (self.dimensions is None or tensors[mark].dim() == self.dimensions) for mark in self.marks)

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors that the kind understands."""
        return frozenset((*self.marks, *self.others, *COMMON))


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The Tucker-2 product: core (r, s, k, k), rows (out, r), columns (s, in) -> (out, in, k, k).

    W[o, i, y, x] = sum over r, s of rows[o, r] core[r, s, y, x] columns[s, i] (Kim et al. 2015, arXiv 1511.06530).
    """
    return torch.einsum("or,rs...,si->oi...", rows, core, columns)


def _size(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
