"""What a LoRA file holds beside LoRA modules, applied to a model: LoHa, LoKr, OFT and others (library/formats/adapters) for any
layer. Training them is LyCORIS' work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.formats.adapters.registry import Adapter, find_adapter
from library.formats.lora_layouts import named_for
from networks.lora import TextEncoders, UNet, Weights, lora_path, named_parts

AnyLayer = nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm


class AdapterModule(nn.Module):
    """The change that an adapter makes to one layer, as a full weight: `multiplier * (dW x + db)` is added to what it gives.

    The change is computed when it is first needed, from the layer that this is attached to, in float32.
    """

    def __init__(self, lora_name: str, adapter: Adapter, multiplier: float = 1.0):
        super().__init__()
        self.lora_name, self.adapter, self.multiplier, self.enabled = lora_name, adapter, multiplier, True
        self.hook: Any = None
        self._change: tuple[Tensor, Tensor | None] | None = None

    def attach(self, layer: AnyLayer) -> None:
        """Add the change to the layer's result from now on."""
        self._change = None
        self.hook = layer.register_forward_hook(self._add)

    def detach(self) -> None:
        """Undo `attach`."""
        if self.hook is not None:
            self.hook.remove()
            self.hook, self._change = None, None

    def _add(self, layer: AnyLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.enabled or self.multiplier == 0:
            return output
        if self._change is None:
            weight, bias = self.changes(layer)
            self._change = weight.to(layer.weight.dtype), None if bias is None else bias.to(layer.weight.dtype)
        weight, bias = self._change
        weight, bias = weight.to(output.device), None if bias is None else bias.to(output.device)
        x = inputs[0] if torch.is_autocast_enabled(output.device.type) else inputs[0].to(weight.dtype)
        return output + (_applied(layer, x, weight, bias) * self.multiplier).to(output.dtype)

    @torch.no_grad()
    def changes(self, layer: AnyLayer, device: Any = None) -> tuple[Tensor, Tensor | None]:
        """What is added to the layer's weight and to its bias at full strength, in float32; None: the bias stays."""
        weight = layer.weight.detach().to(device, torch.float32)
        bias = torch.zeros(len(weight), device=weight.device) if layer.bias is None else layer.bias.detach().to(weight)
        return self.adapter.weight_change(weight), self.adapter.bias_change(bias)

    @torch.no_grad()
    def merge(self, layer: AnyLayer, multiplier: float, dtype: torch.dtype | None, device: Any = None) -> None:
        """Change the layer for good. dtype: round to this first."""
        for old, change in zip((layer.weight, layer.bias), self.changes(layer, device), strict=True):
            if change is None:
                continue
            if old is None:
                raise ValueError(f"{self.lora_name}: it changes a bias that the model's layer has not; is it for another model?")
            old.copy_((old.to(change) + multiplier * change).to(dtype or old.dtype))

    def file_weights(self) -> dict[str, Tensor]:
        """What the file holds of this layer."""
        return dict(self.adapter.parts.tensors)

    def read_scale(self) -> None:
        """Nothing to do: alpha is part of the adapter."""


def _applied(layer: AnyLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer would give with this weight and bias, which for the change of a layer is the change of its result."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight, bias)


def all_layers(text_encoder: TextEncoders, unet: UNet) -> dict[str, AnyLayer]:
    """Every layer that a file can change, by LoRA name: also those that `find_layers` has no LoRA for."""
    layers: dict[str, AnyLayer] = {}
    for prefix, part in named_parts(text_encoder, unet).items():
        for path, module in part.named_modules():
            if isinstance(module, AnyLayer) and module.weight is not None:
                layers[lora_path(path, prefix)] = module
    return layers


def find_modules(weights: Weights, plain: Mapping[str, Any], text_encoder: TextEncoders, unet: UNet) -> dict[str, AdapterModule]:
    """The adapters of these weights for layers of this model, without the LoRAs and DoRAs of `plain` layers.

    Raises ValueError, naming layer and tensors, if they are incomplete or do not fit the layer's shape.
    """
    layers = all_layers(text_encoder, unet)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named_for(weights, layers).items():
        name, _, inside = key.partition(".")
        if name in layers and inside:
            tensors.setdefault(name, {})[inside] = tensor
    found = {}
    for name, parts in tensors.items():
        adapter = find_adapter(name, parts)
        is_empty = any(not part.numel() for part in parts.values())
        if adapter is None or is_empty or (name in plain and adapter.kind.name == "LoRA" and not adapter.changes_bias):
            continue
        weight = layers[name].weight
        try:
            if adapter.matrix_shape not in (None, (len(weight), weight[0].numel())):
                raise adapter.parts.misfit(weight)
        except UserError as error:
            raise ValueError(str(error)) from error
        found[name] = AdapterModule(name, adapter)
    return found
