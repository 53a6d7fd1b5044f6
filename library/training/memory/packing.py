"""--base_dtype: the frozen model's large weights in 8 or 4 bits each, unpacked layer by layer where they are used.

int8: whole numbers from -127 to 127, with one factor for each row of a weight.
fp8:  float8_e4m3fn, 3 bits behind the leading one, with such a factor too. Without it most numbers of Stable Diffusion's weights,
      around 0.02, fall below 2**-6, where the format loses digits.
nf4:  4 bits, one of 16 numbers that cut a normal distribution into equal parts, with one factor for every 64 weights (Dettmers et
      al. 2023, arXiv 2305.14314; the numbers are those of its appendix E).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.training.memory.frozen import FrozenConv2d, FrozenLayer, FrozenLinear, can_be_frozen

FP8 = torch.float8_e4m3fn
BLOCK = 64  # weights of nf4 that share a factor
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LEAST = 1e-12  # least factor, for rows of zeros
PIECE = 1 << 20  # weights that are unpacked at once, so that their float32 numbers take little memory


@dataclass(frozen=True)
class Format:
    """How a weight (out, ...) is kept.

    pack: weight, float32 -> packed values, factors. unpack: packed values, float32 factors and a contiguous tensor that it fills,
    of the weight's shape and any floating type.
    """

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, Tensor], None]
    bits: float  # of one weight with its share of the factors


def _pack_rows(weight: Tensor, kind: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Every row scaled so that its largest number is the largest of the format."""
    scale = weight.abs().flatten(1).amax(dim=1).clamp(min=LEAST) / largest
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    scaled = weight / scale
    return (scaled if kind.is_floating_point else scaled.round()).to(kind), scale


def _unpack_rows(packed: Tensor, scale: Tensor, weight: Tensor) -> None:
    rows = max(1, PIECE // packed[0].numel())
    for begin in range(0, len(packed), rows):
        part = slice(begin, begin + rows)
        weight[part] = packed[part].to(scale.dtype).mul_(scale[part])


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights a byte, the first in the upper half; the last block is filled up with zeros."""
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=LEAST).to(torch.bfloat16)
    levels = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(blocks / scale.float(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return nearest[::2] << 4 | nearest[1::2], scale


def _unpack_nf4(packed: Tensor, scale: Tensor, weight: Tensor) -> None:
    """By a table that has the two values of every byte."""
    levels = torch.tensor(NF4, device=packed.device, dtype=scale.dtype)
    pairs = torch.cartesian_prod(levels, levels)
    flat = weight.view(-1)
    for begin in range(0, flat.numel(), PIECE):
        values = F.embedding(packed[begin // 2 : (begin + PIECE) // 2].int(), pairs).view(-1, BLOCK)
        values *= scale[begin // BLOCK : (begin + PIECE) // BLOCK]
        part = flat[begin : begin + PIECE]
        part.copy_(values.view(-1)[: part.numel()])


FORMATS = {
    "int8": Format(partial(_pack_rows, kind=torch.int8, largest=127.0), _unpack_rows, 8),
    "fp8": Format(partial(_pack_rows, kind=FP8, largest=torch.finfo(FP8).max), _unpack_rows, 8),
    "nf4": Format(_pack_nf4, _unpack_nf4, 4 + 16 / BLOCK),
}


# ---------------------------------------------------------------- layers


class WorkBuffer:
    """Memory for one unpacked weight at a time, which the layers of a model share.

    Memory of its own for each weight leaves holes among the activations, since a CPU's freed memory stays with the run: steps of
    SD 1.5 in int8 at 256 px took 2.9 GB in place of 2.0.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def of(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with content of any kind, good until the next call."""
        count = shape.numel()
        if self.memory.numel() < count or (self.memory.dtype, self.memory.device) != (dtype, device):
            with torch.inference_mode(False):  # what is made inside can be written outside
                self.memory = torch.empty(count, dtype=dtype, device=device)
        return self.memory[:count].view(shape)


class _Packed(FrozenLayer):
    """A layer whose weight is kept packed. `weight` unpacks it, so that whatever reads it goes on working."""

    format: Format
    buffer: WorkBuffer
    packed: Tensor
    scale: Tensor
    shape: torch.Size  # of the weight, and its type
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the type it had, unpacked at every access."""
        return self._unpacked_into(torch.empty(self.shape, dtype=self.dtype, device=self.packed.device))

    @weight.setter
    def weight(self, value: Tensor) -> NoReturn:
        raise AttributeError("a packed weight cannot be replaced")

    def borrowed_weight(self) -> Tensor:
        if torch.compiler.is_compiling():  # compilers plan their memory themselves
            return self.weight
        return self._unpacked_into(self.buffer.of(self.shape, self.dtype, self.packed.device))

    def _unpacked_into(self, weight: Tensor) -> Tensor:
        self.format.unpack(self.packed, self.scale.float(), weight)
        return weight

    @property
    def weight_type(self) -> torch.dtype:
        return self.dtype


class PackedLinear(_Packed, FrozenLinear):
    """A frozen linear layer, its weight packed."""


class PackedConv2d(_Packed, FrozenConv2d):
    """A frozen convolution, its weight packed."""


CLASSES: dict[type[nn.Module], type[_Packed]] = {
    nn.Linear: PackedLinear, FrozenLinear: PackedLinear, nn.Conv2d: PackedConv2d, FrozenConv2d: PackedConv2d,
}  # fmt: skip


@torch.no_grad()
def pack_weights(model: nn.Module, name: str, device: torch.device | None = None) -> int:
    """Keep the weights of all linear and convolution layers in this format; biases, norms and embeddings stay.

    Layers with trainable weights, and those of a class of their own, are left alone. device: where packed weights go, a layer
    at a time; None: they stay where they are. Returns the bytes saved.
    """
    layers = [layer for layer in model.modules() if type(layer) in CLASSES and can_be_frozen(layer)]
    buffer = WorkBuffer()
    saved = sum(pack_layer(layer, name, device, buffer) for layer in layers)
    if layers:
        largest = max((cast(_Packed, layer) for layer in layers), key=lambda layer: layer.shape.numel())
        largest.borrowed_weight()  # the buffer gets the memory that it needs
    return saved


def pack_layer(layer: nn.Module, name: str, device: torch.device | None = None, buffer: WorkBuffer | None = None) -> int:
    """Pack the weight of one layer, in place: hooks and whatever else is attached to the layer stay. Returns the bytes saved."""
    weight = layer.get_parameter("weight")
    packed, scale = FORMATS[name].pack(weight.to(device, torch.float32))
    del layer.weight
    layer.__class__ = CLASSES[type(layer)]
    new = cast(_Packed, layer)
    new.format, new.shape, new.dtype, new.buffer = FORMATS[name], weight.shape, weight.dtype, buffer or WorkBuffer()
    new.packed = nn.Parameter(packed, requires_grad=False)  # parameters, so that they count and move as weights do
    new.register_buffer("scale", scale, persistent=False)
    return weight.nbytes - packed.nbytes - scale.nbytes
