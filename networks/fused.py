"""A frozen layer and its LoRA as one function: the result of one operation after the other, with less memory read and written.

networks/suite_module.py uses it wherever that is the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from library import products
from networks.lora import Layer

if TYPE_CHECKING:
    from networks.suite_module import SuiteModule

FEW_RANKS = 16  # of a convolution with a window: with more of them torch's own are faster


def fused_output(module: SuiteModule, layer: Layer, x: Tensor, output: Tensor) -> Tensor | None:
    """output + module(x), written into `output`, which is what the layer gave for x. None: compute that sum the usual way."""
    if not _fits(module, layer, output):
        return None
    function = _AdaptedConv if isinstance(layer, nn.Conv2d) else _AdaptedLinear
    down, up, factor = module.factors()
    return function.apply(x, down, up, output.detach(), layer, factor)


def _fits(module: SuiteModule, layer: Layer, output: Tensor) -> bool:
    """Whether the module adds the plain formula, and `output` is as the frozen layer returned it: no hook has changed it."""
    if torch.compiler.is_compiling():  # compilers join operations themselves
        return False
    drops = module.training and (module.dropout or module.rank_dropout)
    has_hooks = any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())
    is_plain = _computes_with_its_factors(module) and not drops and not has_hooks
    is_first = next(iter(layer._forward_hooks)) == module.hook.id
    is_frozen = not any(weight.requires_grad for weight in layer.parameters())
    same_type = output.dtype == module.lora_down.weight.dtype or torch.is_autocast_enabled(output.device.type)
    return is_plain and is_first and is_frozen and same_type and _is_known(layer, module.rank) and output.is_contiguous()


def _computes_with_its_factors(module: SuiteModule) -> bool:
    """Whether the class that says what the module's factors are also computes with them, and nothing has taken its place."""
    owner = next(kind for kind in type(module).__mro__ if "factors" in vars(kind))
    return getattr(module.forward, "__func__", None) is vars(owner).get("forward")


def _is_known(layer: Layer, rank: int) -> bool:
    """Whether the layer computes with its `weight` as torch's own class does, and the functions below know how.

    Torch's own forward does, and that of others with `multiplies_by_weight`.
    """
    forward = getattr(layer.forward, "__func__", None)  # None: the method was replaced by a plain function
    if forward is None:
        return False
    if forward not in (nn.Linear.forward, nn.Conv2d.forward) and not getattr(layer, "multiplies_by_weight", False):
        return False
    if isinstance(layer, nn.Linear):
        return True
    if layer.groups > 1 or layer.padding_mode != "zeros":
        return False
    return _is_one_matrix(layer) or (rank <= FEW_RANKS and layer.padding == _centred(layer.kernel_size, layer.dilation))


def _is_one_matrix(layer: nn.Conv2d) -> bool:
    """Whether a convolution multiplies every position by its weight."""
    return (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))


def _centred(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...] | None:
    """The zeros around an input, a side, with which a window's middle goes over every position; None if it has no middle."""
    is_odd = all(size % 2 for size in kernel)
    return tuple(step * (size // 2) for size, step in zip(kernel, dilation, strict=True)) if is_odd else None


class _AdaptedLinear(torch.autograd.Function):
    """A frozen Linear layer with its LoRA as one function: less memory is read and written than by one operation after the other.

    (x (..., in), down (r, in), up (out, r), base (..., out), layer, factor) -> base + up(factor * down(x)), written into `base`,
    which is what the layer gave for x. The factor is a number, or one for each rank, (r,). The gradient to x is that of both, so
    `base` must not have one of its own.
    """

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, base: Tensor, layer: nn.Linear, factor: float | Tensor) -> Tensor:
        rows = x.to(base.dtype).reshape(-1, x.shape[-1])
        factor = factor.to(base.dtype) if isinstance(factor, Tensor) else factor
        hidden = (rows @ down.to(base.dtype).T).mul_(factor)
        base.view(-1, base.shape[-1]).addmm_(hidden, up.to(base.dtype).T)
        ctx.mark_dirty(base)
        ctx.save_for_backward(rows, down, up, hidden)
        ctx.layer, ctx.factor, ctx.shape = layer, factor, x.shape
        return base

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, up, hidden = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_hidden = products.with_few(gradient, up.to(gradient.dtype)).mul_(ctx.factor)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = products.linear(gradient, _weight(ctx.layer).to(gradient.dtype).T)
            to_x = to_x.addmm_(to_hidden, down.to(gradient.dtype)).view(ctx.shape)
        to_down, to_up = products.linear(to_hidden.T, rows.T), products.linear(hidden.T, gradient.T).T
        return to_x, to_down, to_up, None, None, None


class _AdaptedConv(torch.autograd.Function):
    """The same for a frozen convolution: x (B, in, H, W), down (r, in, k, k), up (out, r, 1, 1), base (B, out, H', W').

    Convolutions of few channels take much longer than their arithmetic. So down is one matrix, (r k k, in), whose products are
    shifted and added up; and its gradients are products with shifted copies of the gradient to the r channels.
    """

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, base: Tensor, layer: nn.Conv2d, factor: float | Tensor) -> Tensor:
        columns, window = x.to(base.dtype).flatten(2), _Window.of(layer, x)
        factor = factor[:, None].to(base.dtype) if isinstance(factor, Tensor) else factor
        hidden = window.gathered(products.for_each(_places(down).to(columns.dtype), columns)).mul_(factor)
        base.flatten(2).baddbmm_(_expanded(up, columns), hidden)
        ctx.mark_dirty(base)
        ctx.save_for_backward(columns, down, up, hidden)
        ctx.layer, ctx.factor, ctx.shape, ctx.window = layer, factor, x.shape, window
        return base

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, down, up, hidden = ctx.saved_tensors
        to_x, flat = None, gradient.flatten(2)
        to_places = ctx.window.spread(products.for_each(up.flatten(1).to(flat.dtype).T, flat).mul_(ctx.factor))
        if ctx.needs_input_grad[0]:
            to_x = _gradient_to_input(ctx.layer, gradient, ctx.shape).flatten(2)
            to_x = to_x.baddbmm_(_expanded(_places(down), flat).mT, to_places).view(ctx.shape)
        to_down, to_up = products.summed(to_places, columns), products.summed(hidden, flat).T
        return to_x, _from_places(to_down, down), to_up.reshape(up.shape), None, None, None


@dataclass(frozen=True)
class _Window:
    """How a convolution goes over positions (H, W): products at all places of its window become sums, and back."""

    size: tuple[int, int]
    stride: tuple[int, int]
    places: dict[str, tuple[int, ...]] | None  # of `fold`; None: one place, every position

    @classmethod
    def of(cls, layer: nn.Conv2d, x: Tensor) -> _Window:
        settings = {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "padding": layer.padding}
        return cls(x.shape[2:], layer.stride, None if _is_one_matrix(layer) else settings)  # type: ignore[arg-type]

    def gathered(self, at_places: Tensor) -> Tensor:
        """(B, r k k, H W) -> (B, r, H' W'): each place's products, shifted and added up; in float32, as convolutions add."""
        if self.places is None:
            return at_places
        sums = F.fold(at_places.float(), self.size, **self.places)[:, :, :: self.stride[0], :: self.stride[1]]
        return sums.flatten(2).to(at_places.dtype, copy=True)  # `fold` gives a part of a memory of the products' size

    def spread(self, sums: Tensor) -> Tensor:
        """(B, r, H' W') -> (B, r k k, H W), the gradient of `gathered`."""
        if self.places is None:
            return sums
        whole = sums.new_zeros(*sums.shape[:2], *self.size)
        strided = whole[:, :, :: self.stride[0], :: self.stride[1]]
        strided.copy_(sums.view(strided.shape))
        return F.unfold(whole, **self.places)


def _places(down: Tensor) -> Tensor:
    """(r, in, k, k) -> (r k k, in), a row for each rank and place; turned round, since `fold` moves away from the middle."""
    return down.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2) if down[0, 0].numel() > 1 else down.flatten(1)


def _from_places(gradient: Tensor, down: Tensor) -> Tensor:
    """The reverse of `_places`, in the shape of `down`."""
    rank, channels, *kernel = down.shape
    return gradient.view(rank, *kernel, channels).permute(0, 3, 1, 2).flip(2, 3).contiguous()


def _gradient_to_input(layer: nn.Conv2d, gradient: Tensor, shape: torch.Size) -> Tensor:
    """That of the layer alone. A layer of a class of its own may know a faster way than torch's."""
    if _is_one_matrix(layer):
        flat = gradient.flatten(2)
        return torch.bmm(_expanded(_weight(layer), flat).mT, flat).view(shape)
    own = getattr(layer, "gradient_to_input", None)
    if own is not None:
        return own(gradient, shape)
    return conv2d_input(shape, layer.weight.to(gradient.dtype), gradient, layer.stride, layer.padding, layer.dilation)


def _weight(layer: Layer) -> Tensor:
    """The layer's weight for one product. A packed layer lends memory that the next one takes."""
    borrowed = getattr(layer, "borrowed_weight", None)
    return layer.weight if borrowed is None else borrowed()


def _expanded(weight: Tensor, batch: Tensor) -> Tensor:
    """The matrix of a 1 x 1 convolution, (B, out, in), for each sample of a batch (B, ...) and in its type."""
    return weight.flatten(1).to(batch.dtype).expand(len(batch), -1, -1)
