"""Frozen layers: nothing is kept of their input, since their weights get no gradient, and products by the faster library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from library import products

# Positions of a convolution's result, in the whole batch, up to which it is a product of matrices: of any, and of one whose
# weight has LARGE numbers. At 256 positions 1280 to 1280 channels take 0.75 of the time so, 1920 to 640 0.8, 1280 to 640 1.1.
FEW_POSITIONS, FEW_POSITIONS_OF_LARGE = 64, 256
LARGE = 1 << 23


class _Frozen(torch.autograd.Function):
    """What a frozen layer gives, and the gradient to its input. Neither input nor weight is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.result(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.gradient_to_input(gradient, ctx.shape), None


class FrozenLayer(nn.Module):
    """A layer whose weight is not trained. torch's own convolutions keep their input even then."""

    weight: Tensor
    multiplies_by_weight = True  # as torch's own class does, so that networks/fused.py may compute layer and LoRA as one function

    def result(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient_to_input(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight_type)
        return _Frozen.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.result(x)

    def borrowed_weight(self) -> Tensor:
        """The weight for a product that is made at once: it may lie in memory that the next layer's takes."""
        return self.weight

    @property
    def weight_type(self) -> torch.dtype:
        return self.weight.dtype


class FrozenLinear(FrozenLayer, nn.Linear):
    """A frozen linear layer. torch's own keeps nothing of its input either; this one takes the faster product."""

    def result(self, x: Tensor) -> Tensor:
        return products.linear(x, self.borrowed_weight(), self.bias)

    def gradient_to_input(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return products.linear(gradient, self.borrowed_weight().to(gradient.dtype).T)


class FrozenConv2d(FrozenLayer, nn.Conv2d):
    """A frozen convolution. On a CPU it is a product of matrices where the result has few positions.

    There oneDNN takes as long to reorder a convolution's weight, at every call, as to compute with it.
    """

    def result(self, x: Tensor) -> Tensor:
        weight = self.borrowed_weight()
        if not self._has_few_positions(x.shape, weight):
            return self._conv_forward(x, weight, self.bias)
        height, width = self._result_size(x.shape)
        columns = F.unfold(x, **self._window).transpose(0, 1).flatten(1)  # (in * kernel, B * positions)
        product = products.linear(weight.flatten(1), columns.T)
        if self.bias is not None:
            product += self.bias[:, None]
        product = product.view(-1, len(x), height, width).transpose(0, 1)
        return product.clone(memory_format=torch.contiguous_format)  # autograd refuses to change views of a function in place

    def gradient_to_input(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        weight = self.borrowed_weight().to(gradient.dtype)
        if not self._has_few_positions(shape, weight):
            return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)
        columns = products.with_transposed(weight.flatten(1), gradient.transpose(0, 1).flatten(1))
        return F.fold(columns.view(len(columns), shape[0], -1).transpose(0, 1), shape[2:], **self._window)

    def _has_few_positions(self, shape: torch.Size, weight: Tensor) -> bool:
        is_usual = weight.device.type == "cpu" and weight.dtype == torch.float32 and self.groups == 1
        few = FEW_POSITIONS_OF_LARGE if weight.numel() >= LARGE else FEW_POSITIONS
        return is_usual and shape[0] * self._result_size(shape).numel() <= few

    def _result_size(self, shape: torch.Size) -> torch.Size:
        sides = zip(shape[2:], self.kernel_size, self.stride, self._zeros, self.dilation, strict=True)
        return torch.Size([(side + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, step in sides])

    @property
    def _window(self) -> dict[str, tuple[int, ...]]:
        return {"kernel_size": self.kernel_size, "dilation": self.dilation, "padding": self._zeros, "stride": self.stride}

    @property
    def _zeros(self) -> tuple[int, ...]:
        """Zeros around the input, on a side."""
        assert not isinstance(self.padding, str)  # see can_be_frozen
        return self.padding


def can_be_frozen(layer: nn.Module) -> bool:
    """Whether weight and bias do not learn, and the layer pads with a number of zeros: the gradients here know no other padding.

    A layer without a weight learns: LyCORIS' `algo=full` moves it into a module of its own.
    """
    is_odd = isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str))
    learns = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    return getattr(layer, "weight", None) is not None and not learns and not is_odd


def freeze_layers(model: nn.Module) -> None:
    """Give the model's convolutions, and its linear layers where they gain, the classes above.

    Layers that are trained and those of subclasses are left alone.
    """
    for layer in model.modules():
        if type(layer) is nn.Conv2d and can_be_frozen(layer):
            layer.__class__ = FrozenConv2d  # in place: hooks and whatever else is attached to the layer stay
        elif type(layer) is nn.Linear and can_be_frozen(layer) and products.by_onednn(layer.weight):
            layer.__class__ = FrozenLinear
