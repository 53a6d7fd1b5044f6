"""A frozen layer and its LoRA as one function: the result of one operation after the other, with less memory read and written.

networks/lora.py uses it wherever that is the formula; a copy of that file alone computes one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.lora import Layer, LoRAModule


def fused_output(module: LoRAModule, layer: Layer, x: Tensor, output: Tensor) -> Tensor | None:
    """output + module(x), written into `output`, which is what the layer gave for x. None: compute that sum the usual way."""
    if not _fits(module, layer, output):
        return None
    function = _AdaptedConv if isinstance(layer, nn.Conv2d) else _AdaptedLinear
    factor = module.scale * module.multiplier
    return function.apply(x, module.lora_down.weight, module.lora_up.weight, output.detach(), layer, factor)


def _fits(module: LoRAModule, layer: Layer, output: Tensor) -> bool:
    """Whether the module adds the plain formula, and `output` is as the frozen layer returned it: no hook has changed it."""
    if torch.compiler.is_compiling():  # compilers join operations themselves
        return False
    drops = module.training and (module.dropout or module.rank_dropout)
    has_hooks = any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())
    is_plain = getattr(module.forward, "__func__", None) is LoRAModule.forward and not drops and not has_hooks
    is_first = next(iter(layer._forward_hooks)) == module.hook.id
    is_frozen = not any(weight.requires_grad for weight in layer.parameters())
    same_type = output.dtype == module.lora_down.weight.dtype or torch.is_autocast_enabled(output.device.type)
    return is_plain and is_first and is_frozen and same_type and _is_one_matrix(layer) and output.is_contiguous()


def _is_one_matrix(layer: Layer) -> bool:
    """Whether the layer multiplies every position by its `weight`: torch's own do, and others with `multiplies_by_weight`."""
    forward = getattr(layer.forward, "__func__", None)  # None: the method was replaced by a plain function
    if forward is None:
        return False
    if forward not in (nn.Linear.forward, nn.Conv2d.forward) and not getattr(layer, "multiplies_by_weight", False):
        return False
    if isinstance(layer, nn.Linear):
        return True
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


class _AdaptedLinear(torch.autograd.Function):
    """A frozen Linear layer with its LoRA as one function: less memory is read and written than by one operation after the other.

    (x (..., in), down (r, in), up (out, r), base (..., out), layer, factor) -> base + factor * up(down(x)), written into `base`,
    which is what the layer gave for x. The gradient to x is that of both, so `base` must not have one of its own.
    """

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, base: Tensor, layer: nn.Linear, factor: float) -> Tensor:
        rows = x.to(base.dtype).reshape(-1, x.shape[-1])
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
        to_hidden = (gradient @ up.to(gradient.dtype)).mul_(ctx.factor)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ ctx.layer.weight.to(gradient.dtype)).addmm_(to_hidden, down.to(gradient.dtype)).view(ctx.shape)
        # The gradient to up is computed transposed: with the long side in its rows the product takes twice the time.
        return to_x, to_hidden.T @ rows, (hidden.T @ gradient).T, None, None, None


class _AdaptedConv(torch.autograd.Function):
    """The same for a frozen 1 x 1 convolution: x (B, in, H, W), down (r, in, 1, 1), up (out, r, 1, 1), base (B, out, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, base: Tensor, layer: nn.Conv2d, factor: float) -> Tensor:
        columns = x.to(base.dtype).flatten(2)
        hidden = torch.bmm(_expanded(down, columns), columns).mul_(factor)
        base.flatten(2).baddbmm_(_expanded(up, columns), hidden)
        ctx.mark_dirty(base)
        ctx.save_for_backward(columns, down, up, hidden)
        ctx.layer, ctx.factor, ctx.shape = layer, factor, x.shape
        return base

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, down, up, hidden = ctx.saved_tensors
        gradient = gradient.flatten(2)
        to_hidden = torch.bmm(_expanded(up, gradient).mT, gradient).mul_(ctx.factor)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.bmm(_expanded(ctx.layer.weight, gradient).mT, gradient)
            to_x = to_x.baddbmm_(_expanded(down, gradient).mT, to_hidden).view(ctx.shape)
        to_down, to_up = torch.bmm(to_hidden, columns.mT).sum(0), torch.bmm(hidden, gradient.mT).sum(0).T
        return to_x, to_down.view(down.shape), to_up.reshape(up.shape), None, None, None


def _expanded(weight: Tensor, batch: Tensor) -> Tensor:
    """The matrix of a 1 x 1 convolution, (B, out, in), for each sample of a batch (B, ...) and in its type."""
    return weight.flatten(1).to(batch.dtype).expand(len(batch), -1, -1)
