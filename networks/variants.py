"""Modules that are more than plain LoRAs: other starts (PiSSA, orthogonal), rsLoRA and DoRA.

    --network_args "init=pissa"    --network_args "init=orthogonal"    --network_args "rs_lora=True"    --network_args "dora=True"

The files of all but DoRA are ordinary LoRAs. Those of DoRA have one more tensor a module, `dora_scale`.

A variant is a subclass of `Variant` with `@register` above it; that is all there is to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.lora import Layer, Weights, module_weights, weight_delta
from networks.suite_module import SuiteModule


class Variant(SuiteModule):
    """A kind of LoRA module, chosen by a word of `--network_args`, or by the tensors of a file if it has `own_tensors`.

    word: alone it is a switch, `word=True`; with a choice it is one of the values of that word. is_addition: whether it can be
    combined with another variant, of which it changes one value only. own_tensors: what files hold of such a module beside alpha,
    lora_down.weight and lora_up.weight. stores_as_given: whether files hold rank and alpha as the module was given them.
    """

    title: ClassVar[str]
    word: ClassVar[str]
    choice: ClassVar[str | None] = None
    is_addition: ClassVar[bool] = False
    own_tensors: ClassVar[tuple[str, ...]] = ()
    stores_as_given: ClassVar[bool] = True

    @classmethod
    def option(cls) -> str:
        return f"{cls.word}={cls.choice or True}"

    @classmethod
    def fits(cls, weights: Weights, name: str) -> bool:
        """Whether the module of this name is of this kind in the weights of a file. False if it has no tensors of its own."""
        return any(f"{name}.{tensor}" in weights for tensor in cls.own_tensors)


VARIANTS: list[type[Variant]] = []
Kind = TypeVar("Kind", bound=type[Variant])


def register(kind: Kind) -> Kind:
    """A class decorator: from now on `--network_args` and files can ask for this variant."""
    VARIANTS.append(kind)
    return kind


def combined(kinds: Iterable[type[Variant]]) -> type[Variant] | None:
    """The class for these variants together, additions first; None for none. ValueError if two of them do not go together."""
    kinds = sorted(kinds, key=lambda kind: not kind.is_addition)
    if len(clashing := [kind.option() for kind in kinds if not kind.is_addition]) > 1:
        raise ValueError(f"network_args {' and '.join(clashing)} cannot be combined; give one of them")
    return type("".join(kind.__name__ for kind in kinds), tuple(kinds), {}) if len(kinds) > 1 else next(iter(kinds), None)


@register
class PissaModule(Variant):
    """A LoRA that starts as the principal part of its layer: PiSSA (Meng, Wang and Zhang 2024, arXiv 2404.02948).

    Of W = U S V^T, the r largest singular values make scale * up0 down0 = U_r S_r V_r^T, with the root of S_r in each factor; and

        y = (W - scale * up0 down0) x + scale * up down x,    up and down starting as up0 and down0.

    The layer stays as it is: the start is subtracted here. The file is an ordinary LoRA of twice the rank, [up, -up0] and
    [down; down0], with twice the alpha, for the unchanged model.
    """

    title, word, choice = "PiSSA", "init", "pissa"
    stores_as_given = False
    start_down: Tensor
    start_up: Tensor

    def __init__(self, lora_name: str, layer: Layer, *args: Any, **kwargs: Any):
        super().__init__(lora_name, layer, *args, **kwargs)
        down, up = self.lora_down.weight.detach(), self.lora_up.weight.detach()
        matrix = layer.weight.detach().flatten(1).float()
        count = min(self.rank, *matrix.shape)  # ranks beyond the layer's size start as in any LoRA
        u, s, v = torch.svd_lowrank(matrix, min(count + 8, *matrix.shape), niter=16)
        root = (s[:count] / self.scale).sqrt()
        up.flatten(1)[:, :count] = u[:, :count] * root
        down.flatten(1)[:count] = (v[:, :count] * root).T
        self.register_buffer("start_down", down.clone())
        self.register_buffer("start_up", up.clone())

    def forward(self, x: Tensor) -> Tensor:
        """multiplier * scale * (up down - up0 down0) x"""
        hidden, layer = self.in_own_type(x), self.lora_down
        if isinstance(layer, nn.Conv2d):
            start = F.conv2d(F.conv2d(hidden, self.start_down, None, layer.stride, layer.padding, layer.dilation), self.start_up)
        else:
            start = F.linear(F.linear(hidden, self.start_down), self.start_up)
        return super().forward(x) - start * (self.scale * self.multiplier)

    def product_norm(self) -> Tensor:
        raise ValueError("it would shrink the model's own part, from which init=pissa starts; leave one of them out")

    def file_weights(self) -> dict[str, Tensor]:
        down, up = self.lora_down.weight.detach(), self.lora_up.weight.detach()
        return {
            "alpha": self.alpha * 2,
            "lora_down.weight": torch.cat([down, self.start_down]),
            "lora_up.weight": torch.cat([up, -self.start_up], 1),
        }

    def from_file(self, weights: Weights) -> dict[str, Tensor]:
        up, down, alpha = module_weights(weights, self.lora_name, self.matrix_shape)
        if f"{self.lora_name}.start_up" in weights:  # a state of this network, not a file
            return {key: weights[f"{self.lora_name}.{key}"] for key in self.state_dict()}
        if len(down) != 2 * self.rank:
            raise ValueError(f"{self.lora_name} is not from a run with init=pissa at this rank; leave init out to go on from it")
        half = {"lora_up.weight": up[:, : self.rank], "lora_down.weight": down[: self.rank], "alpha": torch.tensor(alpha / 2)}
        fitted = super().from_file({f"{self.lora_name}.{key}": tensor for key, tensor in half.items()})
        starts = {"start_down": down[self.rank :], "start_up": -up[:, self.rank :]}
        return fitted | {key: tensor.reshape(getattr(self, key).shape) for key, tensor in starts.items()}


@register
class OrthogonalModule(Variant):
    """A LoRA both of whose factors start as random numbers with the product zero.

        down = (G1 Q_odd)^T / 10,    up = G2 Q_even / 10

    G1 (in, rank / 2) and G2 (out, rank / 2) are normal, Q_odd and Q_even alternating rows of a random orthogonal matrix; so
    up down = G2 Q_even Q_odd^T G1^T / 100 = 0. As in peft, after https://datta0.github.io/posts/rethink-lora-init
    """

    title, word, choice = "orthogonal", "init", "orthogonal"

    def __init__(self, lora_name: str, layer: Layer, *args: Any, **kwargs: Any):
        super().__init__(lora_name, layer, *args, **kwargs)
        if self.rank % 2:
            raise ValueError(f"network_args init=orthogonal needs even ranks; {lora_name} has rank {self.rank}")
        down, up = self.lora_down.weight.detach().flatten(1), self.lora_up.weight.detach().flatten(1)
        q = torch.linalg.qr(torch.randn(self.rank, self.rank))[0]
        down.copy_((torch.randn(down.shape[1], self.rank // 2) @ q[0::2]).T / 10)
        up.copy_(torch.randn(self.rank // 2, len(up)).T @ q[1::2] / 10)


@register
class RsLoRAModule(Variant):
    """A LoRA with the scale alpha / sqrt(rank) in place of alpha / rank: rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

    The alpha that is kept and stored is alpha * sqrt(rank), so that every loader computes that scale.
    """

    title, word, is_addition = "rsLoRA", "rs_lora", True
    stores_as_given = False

    def __init__(self, lora_name: str, layer: Layer, rank: int, alpha: float | None, *args: Any, **kwargs: Any):
        super().__init__(lora_name, layer, rank, (alpha or rank) * math.sqrt(rank), *args, **kwargs)


@register
class DoRAModule(Variant):
    """A LoRA that learns size and direction of its layer's weight apart: DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5).

        W' = m * (W + scale * up down) / ||W + scale * up down||

    The norm is of each column, that is of each input channel (of a convolution, over its outputs and positions), and is taken as
    a constant in the gradient (section 4.3). `dora_scale` is m, (1, in) or (1, in, 1, 1), and starts as ||W||. Files in which it
    is (out, 1), with a norm for each output as peft has it, are computed so. A strength other than 1 adds that part of W' - W.
    In files scale is 1, up being multiplied with it, because the A1111 web UI applies it to the whole of W' - W.
    """

    title, word = "DoRA", "dora"
    own_tensors = ("dora_scale",)
    stores_as_given = False

    def __init__(self, lora_name: str, layer: Layer, *args: Any, **kwargs: Any):
        super().__init__(lora_name, layer, *args, **kwargs)
        self._layer = (layer,)  # in a tuple, so that it is no part of this module's state
        self.dora_scale = nn.Parameter(dora_norm(layer.weight.detach(), axis=1))

    def attach(self, layer: Layer) -> None:
        self._layer = (layer,)
        super().attach(layer)

    def forward(self, x: Tensor) -> Tensor:
        """multiplier * (W' - W) x, without a matrix of the size of W in the graph: W' is W + scale * up down, with its columns
        (or rows) multiplied by `gain`."""
        layer = self._layer[0]
        axis = dora_axis(self.dora_scale)
        with torch.no_grad():
            delta = weight_delta(self.lora_up.weight, self.lora_down.weight, self.scale * self.rank).view(layer.weight.shape)
            norm = dora_norm(layer.weight + delta, axis)
        gain = (self.dora_scale / norm).flatten()
        gain = gain.view(1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else gain
        if axis == 1:
            return self._base(x * (gain - 1)) * self.multiplier + super().forward(x * gain)
        return self._base(x) * ((gain - 1) * self.multiplier) + super().forward(x) * gain

    def _base(self, x: Tensor) -> Tensor:
        """W x, without the bias."""
        layer = self._layer[0]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(layer.weight.dtype)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation)
        return F.linear(x, layer.weight)

    def file_weights(self) -> dict[str, Tensor]:
        weights = super().file_weights()
        up = weights["lora_up.weight"] * self.scale
        return weights | {"lora_up.weight": up, "alpha": torch.full_like(self.alpha, self.rank)}

    def from_file(self, weights: Weights) -> dict[str, Tensor]:
        key = f"{self.lora_name}.dora_scale"
        if key not in weights:
            raise ValueError(f"{self.lora_name} is no DoRA in the weights; leave out dora=True to go on from it")
        scale = dora_shaped(weights[key], self._layer[0].weight)
        if scale.shape != self.dora_scale.shape:
            self.dora_scale = nn.Parameter(scale.to(self.dora_scale))
        return super().from_file(weights) | {"dora_scale": scale}

    @classmethod
    def weight_change(cls, weights: Weights, name: str, layer: Layer, device: Any = None) -> Tensor:
        delta = super().weight_change(weights, name, layer, device)
        return dora_change(layer.weight.to(delta), delta, weights[f"{name}.dora_scale"].to(delta))


def dora_change(weight: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """W' - W of a DoRA, where delta is scale * up down in the shape of W."""
    scale, changed = dora_shaped(scale, weight), weight + delta
    return changed * (scale / dora_norm(changed, dora_axis(scale))) - weight


def dora_axis(scale: Tensor) -> int:
    """Which axis of the weight a DoRA's magnitudes are for: 0, outputs, or 1, inputs."""
    return 0 if len(scale) > 1 else 1


def dora_shaped(scale: Tensor, weight: Tensor) -> Tensor:
    """Magnitudes in a shape that goes with the weight: (1, in), (out, 1) or these with two more ones. ValueError if none does."""
    axis = dora_axis(scale)
    if scale.numel() != weight.shape[axis]:
        raise ValueError(f"a dora_scale has the shape {tuple(scale.shape)}, its layer's weight {tuple(weight.shape)}")
    return scale.reshape([-1 if dim == axis else 1 for dim in range(weight.dim())])


def dora_norm(weight: Tensor, axis: int) -> Tensor:
    """The norm over all other axes, in float32, with the shape of the weight but for ones."""
    others = [dim for dim in range(weight.dim()) if dim != axis]
    return torch.linalg.vector_norm(weight.float(), dim=others, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
