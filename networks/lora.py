"""LoRA networks for Stable Diffusion 1.x and 2.x: made, trained, saved, loaded, applied and merged.

LoRA (Hu et al. 2021, arXiv 2106.09685) leaves a layer W frozen and learns a low-rank addition to it:

    y = W(x) + multiplier * (alpha / rank) * up(down(x))

By default ("LierLa") the Linear and 1x1 convolution layers of the text encoder's and the U-Net's attention blocks get one;
with `conv_dim` ("C3Lier") so do the layers of the U-Net's residual blocks and samplers, 3x3 convolutions included.
Files hold `<name>.alpha`, `<name>.lora_down.weight` and `<name>.lora_up.weight`; `<name>` is the layer's path with
underscores. This file needs torch and safetensors alone, and works copied beside any script:

    network, weights = create_network_from_weights(0.8, "mine.safetensors", vae, text_encoder, unet)
    network.apply_to(text_encoder, unet)          # or: network.merge_to(text_encoder, unet, weights), for good
    network.load_state_dict(weights)
    ...
    network.set_multiplier(0.5)
    network.unapply()                             # the model is as it was
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

TEXT_ENCODER_PREFIX = "lora_te"
UNET_PREFIX = "lora_unet"
TEXT_ENCODER_BLOCKS = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})
UNET_BLOCKS = frozenset({"Transformer2DModel"})
UNET_BLOCKS_3X3 = UNET_BLOCKS | {"ResnetBlock2D", "Downsample2D", "Upsample2D"}

Layer = nn.Linear | nn.Conv2d


# ---------------------------------------------------------------- which layers, and what they are called


def find_layers(text_encoder: nn.Module | None, unet: nn.Module | None, conv3x3: bool = False) -> dict[str, Layer]:
    """The layers that can get a LoRA, by LoRA name, in the order in which files list them."""
    layers = _layers_in(text_encoder, TEXT_ENCODER_PREFIX, TEXT_ENCODER_BLOCKS)
    return layers | _layers_in(unet, UNET_PREFIX, UNET_BLOCKS_3X3 if conv3x3 else UNET_BLOCKS)


def _layers_in(root: nn.Module | None, prefix: str, block_classes: frozenset[str]) -> dict[str, Layer]:
    paths: dict[str, Layer] = {}
    for block_path, block in root.named_modules() if root is not None else ():
        if type(block).__name__ in block_classes:
            for path, layer in block.named_modules(prefix=block_path):
                if isinstance(layer, Layer):
                    paths[path] = layer
    names = {}
    # Files list a transformer block as attn1, ff, attn2; today's Diffusers holds it as attn1, attn2, ff.
    for _, group in itertools.groupby(paths, key=_transformer_block):
        for path in sorted(group, key=lambda p: ".attn2." in p):
            names[f"{prefix}_{_standard_path(path, prefix).replace('.', '_')}"] = paths[path]
    return names


def _transformer_block(path: str) -> str:
    """`...transformer_blocks.0.attn1.to_q` -> `...transformer_blocks.0`; any other path as it is."""
    parts = path.split(".")
    return ".".join(parts[: parts.index("transformer_blocks") + 2]) if "transformer_blocks" in parts else path


def _standard_path(path: str, prefix: str) -> str:
    """The path as files have it: transformers 5.6 dropped the `text_model` level of `CLIPTextModel`, files keep it."""
    return f"text_model.{path}" if prefix == TEXT_ENCODER_PREFIX and not path.startswith("text_model.") else path


# ---------------------------------------------------------------- one layer


class LoRAModule(nn.Module):
    """The low-rank addition to one Linear or Conv2d layer. `forward` gives the addition alone.

    Shapes: Linear in -> out has down (rank, in) and up (out, rank); Conv2d k x k has down (rank, in, k, k), with the layer's
    stride and padding, and up (out, rank, 1, 1). `down` starts uniform in +-1/sqrt(fan_in), `up` at zero: so the start is
    the base model. All three dropouts act in training mode only.
    """

    def __init__(
        self,
        lora_name: str,
        layer: Layer,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ):
        super().__init__()
        self.lora_name, self.rank, self.multiplier, self.enabled = lora_name, rank, multiplier, True
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        if isinstance(layer, nn.Conv2d):
            self.lora_down: Layer = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False
            )
            self.lora_up: Layer = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.read_scale()
        self._hook: Any = None

    def read_scale(self) -> None:
        """Set the scale from the alpha tensor, once: reading a tensor at every step would make the host wait for the GPU."""
        self.scale = float(self.alpha) / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """multiplier * scale * up(down(x)): (B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W')."""
        hidden = self.lora_down(self.in_own_type(x))
        factor = self.scale * self.multiplier
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout:
            hidden = hidden * self._rank_mask(hidden)
            factor = factor / (1 - self.rank_dropout)
        # The rank is the narrowest place, so scaling costs least there.
        return self.lora_up(hidden * factor)

    def in_own_type(self, x: Tensor) -> Tensor:
        """x in the type of these weights, which may differ from the layer's; autocast sees to that itself."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_down.weight.dtype)

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """0 or 1 for each sample and rank, the same at every token or position."""
        keep = torch.rand(hidden.shape[0], self.rank, device=hidden.device) > self.rank_dropout
        if isinstance(self.lora_down, nn.Conv2d):
            return keep[:, :, None, None]
        return keep.view(hidden.shape[0], *[1] * (hidden.dim() - 2), self.rank)

    def is_idle(self) -> bool:
        """Whether this call adds nothing: switched off, strength 0 outside of training, or dropped as a whole."""
        if not self.enabled or (self.multiplier == 0 and not self.training):
            return True
        # Drawn on the CPU: its generator is saved and restored by gradient checkpointing, and nothing waits for a GPU.
        return self.training and self.module_dropout > 0 and torch.rand(()).item() < self.module_dropout

    def attach(self, layer: Layer) -> None:
        """Add this module's result to the layer's from now on. Several networks may be attached to one layer."""
        self._hook = layer.register_forward_hook(self._add)

    def _add(self, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.is_idle():
            return output
        if not torch.compiler.is_compiling() and self._fits_one_function(layer, output):  # compilers join operations themselves
            function = _AdaptedConv if isinstance(layer, nn.Conv2d) else _AdaptedLinear
            weights = self.lora_down.weight, self.lora_up.weight
            return function.apply(inputs[0], *weights, output.detach(), layer, self.scale * self.multiplier)
        return output + self(inputs[0]).to(output.dtype)

    def _fits_one_function(self, layer: Layer, output: Tensor) -> bool:
        """Whether layer and addition can be one function: the plain formula, on the unchanged output of a frozen layer."""
        draws = self.training and (self.dropout or self.rank_dropout)
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        is_plain = getattr(self.forward, "__func__", None) is LoRAModule.forward and not draws and not watched
        is_first = next(iter(layer._forward_hooks)) == self._hook.id
        is_frozen = not any(weight.requires_grad for weight in layer.parameters())
        same_type = output.dtype == self.lora_down.weight.dtype or torch.is_autocast_enabled(output.device.type)
        return is_plain and is_first and is_frozen and same_type and _is_one_matrix(layer) and output.is_contiguous()

    def detach(self) -> None:
        """Undo `attach`."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def product_norm(self) -> Tensor:
        """||scale * up down||, the Frobenius norm."""
        return weight_delta(self.lora_up.weight, self.lora_down.weight, self.scale * self.rank).norm()

    def file_weights(self) -> dict[str, Tensor]:
        """What a file holds of this module: alpha, lora_down.weight and lora_up.weight."""
        return {key: tensor.detach() for key, tensor in self.state_dict().items()}

    def from_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a file, by their names in it, that are this module's, in its shapes. ValueError if the rank differs."""
        up, down, alpha = module_weights(weights, self.lora_name, self)
        if len(down) != self.rank:
            option = "--network_dim " if kernel_size(self.lora_down) == 1 else "--network_args conv_dim="
            raise ValueError(
                f"{self.lora_name} has rank {len(down)} in the weights and {self.rank} in this network; "
                f"use --dim_from_weights or {option}{len(down)}"
            )
        if f"{self.lora_name}.dora_scale" in weights and not hasattr(self, "dora_scale"):
            raise ValueError(f"{self.lora_name} is a DoRA in the weights; use --dim_from_weights or --network_args dora=True")
        shaped = {
            "lora_up.weight": up.reshape(self.lora_up.weight.shape),
            "lora_down.weight": down.reshape(self.lora_down.weight.shape),
        }
        return {"alpha": torch.tensor(alpha), **shaped}


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


def _is_one_matrix(layer: Layer) -> bool:
    """Whether the layer multiplies every position by its `weight`. Layers of other classes may do more than torch's own."""
    forward = getattr(layer.forward, "__func__", None)  # no method if something has taken its place
    is_frozen_layer = forward is not None and hasattr(layer, "gradient_to_input")  # of library/training/frozen.py
    if forward not in (nn.Linear.forward, nn.Conv2d.forward) and not is_frozen_layer:
        return False
    if isinstance(layer, nn.Linear):
        return True
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _expanded(weight: Tensor, batch: Tensor) -> Tensor:
    """The matrix of a 1 x 1 convolution, (B, out, in), for each sample of a batch (B, ...) and in its type."""
    return weight.flatten(1).to(batch.dtype).expand(len(batch), -1, -1)


# ---------------------------------------------------------------- the network


class LoRANetwork(nn.Module):
    """LoRA modules for the layers of a text encoder and a U-Net, as one module with one state.

    layers: what `find_layers` gave; ranks: (rank, alpha) by LoRA name, for those layers that get a module; classes: of those
    modules that are not of the network's usual class.
    """

    module_class = LoRAModule

    def __init__(
        self,
        layers: Mapping[str, Layer],
        ranks: Mapping[str, tuple[int, float | None]],
        multiplier: float = 1.0,
        args: NetworkArgs | None = None,
        classes: Mapping[str, type[LoRAModule]] | None = None,
    ):
        super().__init__()
        self.multiplier = multiplier
        self.args = args or NetworkArgs()
        self.text_encoder_loras: list[LoRAModule] = []
        self.unet_loras: list[LoRAModule] = []
        for name, layer in layers.items():
            if name in ranks:
                module_class = (classes or {}).get(name, self.module_class)
                module = module_class(name, layer, *ranks[name], multiplier, **self.args.dropouts)
                self.add_module(name, module)
                (self.unet_loras if name.startswith(UNET_PREFIX) else self.text_encoder_loras).append(module)
        if not self.loras:
            raise ValueError("no layer for a LoRA was found in the text encoder and U-Net; are they Stable Diffusion 1.x or 2.x?")
        logger.info("LoRA modules: %d text encoder, %d U-Net", len(self.text_encoder_loras), len(self.unet_loras))

    @property
    def loras(self) -> list[LoRAModule]:
        return self.text_encoder_loras + self.unet_loras

    # ---- on and off

    def apply_to(
        self, text_encoder: nn.Module | None, unet: nn.Module | None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Attach the modules to the model's layers. Parts not applied are dropped: neither trained nor saved."""
        if not apply_text_encoder:
            self._drop(self.text_encoder_loras)
        if not apply_unet:
            self._drop(self.unet_loras)
        self.unapply()
        layers = find_layers(text_encoder, unet, conv3x3=True)
        for name, module in self.named_children():
            if name not in layers:
                raise ValueError(f"the model has no layer for the LoRA module {name}; was the network made for another model?")
            module.attach(layers[name])

    def _drop(self, modules: list[LoRAModule]) -> None:
        for module in modules:
            delattr(self, module.lora_name)
        modules.clear()

    def unapply(self) -> None:
        """Detach from the model, which is then bit for bit what it was. The modules keep their weights."""
        for module in self.loras:
            module.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """The strength of every module from now on; 1 is what was trained."""
        self.multiplier = multiplier
        for module in self.loras:
            module.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        """Switch every module on or off, without touching its strength."""
        for module in self.loras:
            module.enabled = is_enabled

    def is_mergeable(self) -> bool:
        """Whether `merge_to` gives the same result as `apply_to`."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: nn.Module | None,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Change the model's layers for good: W += multiplier * alpha / rank * up down (or DoRA's change), in float32.

        dtype: round the result to this first (the layers keep their own type); device: calculate there.
        """
        layers = find_layers(text_encoder, unet, conv3x3=True)
        weights_sd = kohya_weights(weights_sd)
        for name in names_in_both(weights_sd, layers):
            weight = layers[name].weight
            change = weight_change(weights_sd, name, layers[name], device or weight.device)
            merged = weight.to(change) + self.multiplier * change
            weight.copy_(merged.to(dtype or weight.dtype))

    # ---- training

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their names for the log. A rate of None means the default; parts of rate 0 are left out.

        With block weights the U-Net has one group a block, its rate times the weight. With LoRA+ (Hayou et al. 2024, arXiv
        2402.12354) each group is two: down with its rate, up with the ratio times as much.
        """
        args, groups, names = self.args, [], []
        parts = {"textencoder": (text_encoder_lr, args.loraplus_text_encoder_lr_ratio, self.text_encoder_loras)}
        for module in self.unet_loras:
            name, weight = args.lr_block(module.lora_name)
            lr = default_lr if unet_lr is None else unet_lr
            parts.setdefault(name, (lr * weight, args.loraplus_unet_lr_ratio, []))[2].append(module)
        for name, (lr, ratio, modules) in parts.items():
            lr = default_lr if lr is None else lr
            if modules and not lr:
                logger.warning("%s: learning rate 0, not trained", name)
            if not modules or not lr:
                continue
            ratio = ratio or args.loraplus_lr_ratio
            if ratio:
                ups = [m.lora_up.weight for m in modules]
                others = [p for m in modules for p in m.parameters() if p is not m.lora_up.weight]
                groups += [{"params": others, "lr": lr}, {"params": ups, "lr": lr * ratio}]
                names += [name, f"{name} plus"]
            else:
                groups.append({"params": [p for m in modules for p in m.parameters()], "lr": lr})
                names.append(name)
        if not groups:
            raise ValueError("nothing to train: every learning rate is 0; give --learning_rate, --unet_lr or --text_encoder_lr")
        return groups, names

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the modules are recomputed with the model's own checkpoints, to which they are attached."""

    def prepare_grad_etc(self, text_encoder: nn.Module | None, unet: nn.Module | None) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: nn.Module | None, unet: nn.Module | None) -> None:
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Shrink every module whose ||scale * up down|| (Frobenius) exceeds max_norm to that norm.

        Returns how many were shrunk, and the mean and the largest norm afterwards, as tensors: reading them is left to the
        caller, since it waits for the GPU.
        """
        if self.args.init == "pissa":
            raise ValueError("it would shrink the model's own part, from which init=pissa starts; leave one of them out")
        ratios, norms = [], []
        for module in self.loras:
            norm = module.product_norm().clamp(min=max_norm / 2)
            ratio = norm.clamp(max=max_norm) / norm
            module.lora_up.weight.mul_(ratio.sqrt())
            module.lora_down.weight.mul_(ratio.sqrt())
            ratios.append(ratio)
            norms.append(norm * ratio)
        stacked = torch.stack(norms)
        return (torch.stack(ratios) != 1).sum(), stacked.mean(), stacked.max()

    # ---- files

    def save_weights(self, file: str | os.PathLike, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the file, whole or not at all; see `save_tensors`. dtype None keeps the weights' own."""
        tensors = {key: t.to("cpu", dtype or t.dtype).contiguous() for key, t in self.file_weights().items()}
        if metadata and "ss_network_dim" in metadata and (self.args.dora or self.args.rs_lora or self.args.init == "pissa"):
            first = self.loras[0].file_weights()
            facts = {"ss_network_dim": len(first["lora_down.weight"]), "ss_network_alpha": first["alpha"].item()}
            metadata = {**metadata, **{key: str(value) for key, value in facts.items()}}
        save_tensors(tensors, file, metadata)

    def file_weights(self) -> dict[str, Tensor]:
        """The tensors of the file, as any loader takes them."""
        return {f"{name}.{key}": t for name, module in self.named_children() for key, t in module.file_weights().items()}

    def load_weights(self, file: str | os.PathLike) -> Any:
        """Load a file; the alphas, and so the scales, are the file's. Returns the missing and the unexpected keys."""
        weights = load_tensors(file)
        names_in_both(weights, dict(self.named_children()))
        result = self.load_state_dict(weights, strict=False)
        conv3x3 = {k: t for k, t in weights.items() if k.endswith(".lora_down.weight") and t.dim() == 4 and t[0, 0].numel() > 1}
        if conv3x3 and self.unet_loras and all(kernel_size(m.lora_down) == 1 for m in self.unet_loras):
            rank = len(next(iter(conv3x3.values())))
            raise ValueError(
                f"{file} has 3x3 convolutions, this network has none; use --dim_from_weights or --network_args conv_dim={rank}"
            )
        return result

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, for files of any layout: alpha may be missing (then it is the rank); Linear and 1x1 convolution fit."""
        fitted = kohya_weights(state_dict)
        for name, module in self.named_children():
            if f"{name}.lora_down.weight" in fitted and f"{name}.lora_up.weight" in fitted:
                fitted |= {f"{name}.{key}": tensor for key, tensor in module.from_file(fitted).items()}
        result = super().load_state_dict(fitted, strict=strict, assign=assign)
        for module in self.loras:
            module.read_scale()
        return result

    # ---- in words

    def summary(self, dtype: torch.dtype | None = None) -> str:
        """Modules, ranks, trainable numbers, the size of the file in this dtype (None: as it is); a chart if blocks differ."""
        blocks: dict[str, list[LoRAModule]] = {}
        for module in sorted(self.unet_loras, key=lambda m: block_index(m.lora_name) or 0):
            blocks.setdefault(BLOCKS[block_index(module.lora_name) or 0], []).append(module)
        size = sum(t.numel() * (dtype or t.dtype).itemsize for t in self.file_weights().values()) / 2**20
        numbers = sum(p.numel() for p in self.parameters())
        lines = [f"{len(self.loras)} LoRA modules, {numbers:,} trainable numbers; a file will have about {size:.1f} MiB"]
        parts = {"text encoder": self.text_encoder_loras, "U-Net": self.unet_loras}
        counts = ", ".join(f"{name} {len(modules)}" for name, modules in blocks.items())
        is_uniform = self.args.lr_weights is None and ";" not in ranks_text(self.unet_loras).replace("; 3x3", "")
        for name, modules in parts.items():
            ranks = f", {ranks_text(modules)}" if is_uniform or name != "U-Net" else ""
            lines += [f"  {name}: {len(modules)} modules{ranks}"] * bool(modules)
        if is_uniform:
            return "\n".join(lines + [f"  modules by block: {counts}"] * bool(blocks))
        rows = [(name, len(modules), ranks_text(modules), *self._bars(modules)) for name, modules in blocks.items()]
        widths = [max(len(row[i]) for row in rows) for i in (2, 3)]
        return "\n".join(
            lines + [f"  {n:5} {c:3} modules  {r:{widths[0]}}  {a:{widths[1]}}  {b}".rstrip() for n, c, r, a, b in rows]
        )

    def _bars(self, modules: list[LoRAModule]) -> tuple[str, str]:
        """A block's largest rank as a bar, a mark for 2 ranks, and the weight of its learning rate as one, a mark for 0.1."""
        weight = self.args.lr_block(modules[0].lora_name)[1]
        ranks = "#" * min(32, -(-max(module.rank for module in modules) // 2))
        return ranks, "" if self.args.lr_weights is None else f"rate x {weight:<5.3g} " + "=" * min(40, round(10 * weight))


def ranks_text(modules: list[LoRAModule]) -> str:
    """`rank 4, alpha 1; 3x3: rank 2, alpha 1`; each rank once."""
    kinds = sorted({(kernel_size(m.lora_down) > 1, m.rank, round(m.alpha.item(), 3)) for m in modules})
    return "; ".join(f"{'3x3: ' if is_3x3 else ''}rank {rank}, alpha {alpha:g}" for is_3x3, rank, alpha in kinds)


# ---------------------------------------------------------------- weights as tensors


def weight_delta(up: Tensor, down: Tensor, alpha: float, device: Any = None) -> Tensor:
    """alpha / rank * up down in float32: (out, in), or (out, in, k, k) for a convolution."""
    up, down = up.to(device, torch.float32), down.to(device, torch.float32)
    return (up.flatten(1) @ down.flatten(1)).mul_(alpha / down.shape[0]).view(up.shape[0], *down.shape[1:])


def weight_change(weights: Mapping[str, Tensor], name: str, layer: Layer, device: Any = None) -> Tensor:
    """What the module of this name adds to the weight of this layer, in float32 and the weight's shape."""
    delta = weight_delta(*module_weights(weights, name, layer), device=device).view(layer.weight.shape)
    if f"{name}.dora_scale" not in weights:
        return delta
    return variants().dora_change(layer.weight.to(delta), delta, weights[f"{name}.dora_scale"].to(delta))


OTHER_FORMATS = {
    "lora_te1_": "a LoRA for SDXL",
    "lora_te2_": "a LoRA for SDXL",
    "lora_unet_input_blocks_": "a LoRA for SDXL",
    "hada_w1": "a LoHa (LyCORIS)",
    "lokr_w": "a LoKr (LyCORIS)",
    ".lora_mid.": "a LoCon in Tucker form (LyCORIS)",
    ".lora_A.": "a LoRA for another kind of model",
    "model.diffusion_model.": "a whole model",
}


def names_in_both(weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> list[str]:
    """The LoRA modules of these weights that `known` has too. Warns of tensors not used; ValueError if all are not."""
    names = [key.removesuffix(".lora_down.weight") for key in weights if key.endswith(".lora_down.weight")]
    found = {name for name in names if name in known and f"{name}.lora_up.weight" in weights}
    reason = next((f"they are {text}" for mark, text in OTHER_FORMATS.items() if any(mark in key for key in weights)), "")
    if not found:
        raise ValueError(
            f"none of these weights ({len(names)} LoRA modules, {len(weights)} tensors) has a layer in this model; "
            + (reason or "are they a LoRA for Stable Diffusion 1.x or 2.x?")
        )
    unused = []
    for key in weights:
        name, _, tensor = key.partition(".")
        if name not in found:
            unused.append(key)
        elif tensor not in ("alpha", "lora_down.weight", "lora_up.weight", "dora_scale"):
            raise ValueError(f"{key} is not supported; " + (reason or "it is not part of a plain LoRA"))
    if unused:
        logger.warning("%d of %d tensors have no layer in this model, such as %s", len(unused), len(weights), unused[0])
    return [name for name in names if name in found]


def module_weights(weights: Mapping[str, Tensor], name: str, target: Layer | LoRAModule) -> tuple[Tensor, Tensor, float]:
    """(up, down, alpha) of one module, checked against the layer or LoRA module it is for. No alpha, or 0: the rank."""
    up, down = weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]
    if isinstance(target, LoRAModule):
        out_size, in_size = len(target.lora_up.weight), target.lora_down.weight[0].numel()
    else:
        out_size, in_size = len(target.weight), target.weight[0].numel()
    rank = len(down)
    # Sizes, not shapes: SD 2 has its projections as Linear (2-D) or as 1x1 convolution (4-D), and weights fit both.
    if (len(up), up[0].numel(), down[0].numel()) != (out_size, rank, in_size):
        raise ValueError(
            f"{name}: the weights (down {tuple(down.shape)}, up {tuple(up.shape)}) do not fit this model's layer "
            f"({in_size} in, {out_size} out); are they for another Stable Diffusion version?"
        )
    alpha = weights.get(f"{name}.alpha")
    return up, down, float(alpha if alpha is not None else 0) or float(rank)


def load_tensors(file: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled one, in which no code is run; by kohya's names."""
    file, metadata = Path(file), {}
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as content:
                metadata = content.metadata() or {}
                tensors = {key: content.get_tensor(key) for key in content.keys()}
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {file}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is damaged or no weights file ({reason}); fetch or save it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is no LoRA file: it holds more than tensors by name")
    return kohya_weights(tensors, PeftConfig(file, metadata))


def save_tensors(tensors: Mapping[str, Tensor], file: str | os.PathLike, metadata: Mapping[str, str] | None) -> None:
    """Write tensors to .safetensors, with metadata and its hashes if metadata is given, or to .ckpt/.pt, a plain dictionary.

    The file appears under its name only when whole. Raises ValueError, naming the key, for a value that is not finite.
    """
    file = Path(file)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file} was not written: {key} holds NaN or infinity in {str(tensor.dtype).removeprefix('torch.')}")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{uuid.uuid4().hex[:8]}{file.suffix}")
    try:
        if file.suffix == ".safetensors":
            metadata = with_hashes(tensors, metadata) if metadata is not None else None
            safetensors.torch.save_file(dict(tensors), temporary, metadata)
        else:
            torch.save(dict(tensors), temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata and the two hashes by which web UIs know a LoRA.

    sshs_model_hash: SHA-256 of the tensor data alone. sshs_legacy_hash: 8 digits over bytes 0x100000 to 0x110000 of the file
    as it would be with the metadata keys `ss_...` only.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = memoryview(safetensors.torch.save(dict(tensors), training))
    data_start = 8 + int.from_bytes(content[:8], "little")
    return {
        **metadata,
        "sshs_model_hash": hashlib.sha256(content[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


# ---------------------------------------------------------------- files of other programs

# `...to_q.lora_A.weight` (peft, Diffusers), `...to_q.lora.down.weight`, `...q_proj.lora_linear_layer.down.weight`,
# `...attn1.processor.to_q_lora.down.weight` (older Diffusers)
FOREIGN_KEY = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<side>A|B)(?:\.\w+)?|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old_side>down|up))\.weight"
    r"|(?P<magnitude>.+?)\.lora_magnitude_vector(?:\.\w+)*|(?P<alpha>.+?)\.alpha"
)
SIDES = {"A": "lora_down.weight", "down": "lora_down.weight", "B": "lora_up.weight", "up": "lora_up.weight"}


def lora_name(path: str) -> str | None:
    """The LoRA name of a layer, given as any layout gives it, or None.

    >>> lora_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    if path.startswith((f"{TEXT_ENCODER_PREFIX}_", f"{UNET_PREFIX}_")):
        return path
    path = path.removeprefix("base_model.model.").replace(".processor.", ".")
    part, _, inside = path.partition(".")
    if part not in ("unet", "text_encoder"):
        part, inside = "unet" if path.startswith(("down_blocks.", "up_blocks.", "mid_block.")) else "text_encoder", path
    if part == "unet":
        prefix, inside = UNET_PREFIX, re.sub(r"\.to_out$", ".to_out.0", inside)
    else:
        inside = inside.removeprefix("text_model.")
        prefix, inside = f"{TEXT_ENCODER_PREFIX}_text_model", re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", inside)
    is_known = inside.startswith(("down_blocks.", "up_blocks.", "mid_block.") if part == "unet" else "encoder.layers.")
    return f"{prefix}_{inside.replace('.', '_')}" if is_known else None


def kohya_weights(weights: Mapping[str, Tensor], config: PeftConfig | None = None) -> dict[str, Tensor]:
    """The weights by the names that this module's own files have; names in no known layout stay as they are.

    config: where the alphas of Diffusers' and peft's layouts are written down. Without it they are the ranks.
    """
    result = {}
    for key, tensor in weights.items():
        match = None if key.startswith((f"{TEXT_ENCODER_PREFIX}_", f"{UNET_PREFIX}_")) else FOREIGN_KEY.fullmatch(key)
        path = match and (match["path"] or match["magnitude"] or match["alpha"])
        name = path and lora_name(path)
        if not name:
            result[key] = tensor
        elif match["path"]:
            side = SIDES[match["side"] or match["old_side"]]
            result[f"{name}.{side}"] = tensor
            alpha = config.alpha(path, len(tensor)) if config and side == "lora_down.weight" else None
            if alpha is not None:
                result.setdefault(f"{name}.alpha", torch.tensor(alpha))
        else:
            result[f"{name}.alpha" if match["alpha"] else f"{name}.dora_scale"] = tensor if match["alpha"] else tensor.view(-1, 1)
    return result


class PeftConfig:
    """The alphas that Diffusers and peft keep beside the tensors: in the file's metadata or in `adapter_config.json`."""

    def __init__(self, file: Path, metadata: Mapping[str, str]):
        self._parts: dict[str, dict[str, Any]] = {}
        beside = file.parent / "adapter_config.json"
        try:
            if "lora_adapter_metadata" in metadata:
                for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                    part, _, name = key.partition(".")
                    self._parts.setdefault(part, {})[name] = value
            elif file.stem == "adapter_model" and beside.is_file():
                self._parts[""] = dict(json.loads(beside.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: the description of its alphas is not readable ({error})") from error

    def alpha(self, path: str, rank: int) -> float | None:
        """The alpha, as this module's files have it, of the layer at this path; None if nothing says it."""
        path = path.removeprefix("base_model.model.")
        part, _, inside = path.partition(".")
        config, inside = (self._parts[part], inside) if part in self._parts else (self._parts.get("", {}), path)
        alpha = config.get("lora_alpha")
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            if inside == pattern or inside.endswith(f".{pattern}"):
                alpha = own
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


# ---------------------------------------------------------------- network_args


BLOCKS = [*(f"IN{i:02}" for i in range(12)), "MID", *(f"OUT{i:02}" for i in range(12))]
INITS = ("default", "pissa", "orthogonal")
LR_PRESETS = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


def block_index(lora_name: str) -> int | None:
    """The U-Net block, 0 to 24 (see `BLOCKS`), that a LoRA name belongs to; None in the text encoder."""
    if lora_name.startswith(f"{UNET_PREFIX}_mid_block_"):
        return 12
    match = re.match(rf"{UNET_PREFIX}_(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_", lora_name)
    if match is None:
        return None
    side, block, kind, place = match.groups()
    index = (1 if side == "down" else 13) + 3 * int(block) + (2 if kind.endswith("samplers") else int(place))
    return index if index < len(BLOCKS) else None


def read_int(text: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ValueError(f"'{text}' is not a whole number")
    return int(text)


def read_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"'{text}' is not a number")
    return number


def read_share(text: str) -> float:
    share = read_float(text)
    if not 0 <= share < 1:
        raise ValueError("must be at least 0 and below 1")
    return share


def read_bool(text: str) -> bool:
    if text.strip().lower() not in ("true", "false", "1", "0"):
        raise ValueError("give True or False")
    return text.strip().lower() in ("true", "1")


def read_init(text: str) -> str:
    if text not in INITS:
        raise ValueError(f"give one of {', '.join(INITS)}")
    return text


def read_blocks(read_item: Callable[[str], Any], text: str) -> tuple:
    """25 numbers, one a block."""
    items = text.split(",")
    if len(items) != len(BLOCKS):
        raise ValueError(f"{len(items)} numbers given, 25 needed: {' '.join(BLOCKS)}")
    return tuple(read_item(item) for item in items)


def read_lr_weights(text: str) -> tuple[float, ...]:
    """12 numbers, or a preset such as `sine` or `sine+0.25`. Fewer numbers are filled up with 1."""
    if "," in text:
        items = [read_float(item) for item in text.removesuffix(",").split(",")]
        if len(items) > 12:
            raise ValueError(f"{len(items)} numbers given, 12 needed")
        return (*items, *[1.0] * (12 - len(items)))
    preset, _, offset = text.partition("+")
    if preset.strip() not in LR_PRESETS:
        raise ValueError(f"give 12 numbers with commas, or a preset ({', '.join(LR_PRESETS)}), which may be as sine+0.25")
    return tuple(LR_PRESETS[preset.strip()](i / 11) + (read_float(offset) if offset else 0.0) for i in range(12))


def _read_by(read: Callable[[str], Any]) -> Any:
    """A word of `NetworkArgs`, and how its text becomes a value."""
    return field(default=None, metadata={"read": read})


@dataclass(frozen=True)
class NetworkArgs:
    """What `--network_args` can say. None: not given.

    rs_lora: the scale is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732). The alpha that is
    kept and stored is alpha * sqrt(rank), so that every loader computes that scale.
    """

    conv_dim: int | None = _read_by(read_int)
    conv_alpha: float | None = _read_by(read_float)
    init: str | None = _read_by(read_init)
    rs_lora: bool | None = _read_by(read_bool)
    dora: bool | None = _read_by(read_bool)
    dropout: float | None = _read_by(read_share)
    rank_dropout: float | None = _read_by(read_share)
    module_dropout: float | None = _read_by(read_share)
    block_dims: tuple[int, ...] | None = _read_by(partial(read_blocks, read_int))
    block_alphas: tuple[float, ...] | None = _read_by(partial(read_blocks, read_float))
    conv_block_dims: tuple[int, ...] | None = _read_by(partial(read_blocks, read_int))
    conv_block_alphas: tuple[float, ...] | None = _read_by(partial(read_blocks, read_float))
    down_lr_weight: tuple[float, ...] | None = _read_by(read_lr_weights)
    mid_lr_weight: float | None = _read_by(read_float)
    up_lr_weight: tuple[float, ...] | None = _read_by(read_lr_weights)
    block_lr_zero_threshold: float | None = _read_by(read_float)
    loraplus_lr_ratio: float | None = _read_by(read_float)
    loraplus_unet_lr_ratio: float | None = _read_by(read_float)
    loraplus_text_encoder_lr_ratio: float | None = _read_by(read_float)

    @property
    def dropouts(self) -> dict[str, float]:
        kinds = ("dropout", "rank_dropout", "module_dropout")
        return {kind: getattr(self, kind) or 0.0 for kind in kinds}

    @property
    def variant(self) -> str | None:
        """The key of `variants.CLASSES` that the modules need, if they are not plain."""
        return "dora" if self.dora else self.init if self.init in ("pissa", "orthogonal") else None

    @property
    def conv3x3(self) -> bool:
        return self.conv_dim is not None or self.conv_block_dims is not None

    @cached_property
    def lr_weights(self) -> tuple[float, ...] | None:
        """25 learning rate weights, one a block, or None. Those at or below the threshold are 0."""
        if (self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight) == (None, None, None):
            return None
        mid = 1.0 if self.mid_lr_weight is None else self.mid_lr_weight
        weights = (*(self.down_lr_weight or [1.0] * 12), mid, *(self.up_lr_weight or [1.0] * 12))
        threshold = self.block_lr_zero_threshold or 0.0
        return tuple(0.0 if weight <= threshold else weight for weight in weights)

    def lr_block(self, lora_name: str) -> tuple[str, float]:
        """The optimizer group of a U-Net module, and the weight of its learning rate."""
        block = block_index(lora_name)
        if self.lr_weights is None or block is None:
            return "unet", 1.0
        return f"unet_block{block}", self.lr_weights[block]

    def rank_and_alpha(self, lora_name: str, is_3x3: bool, dim: int, alpha: float) -> tuple[int, float]:
        """What a layer gets, given network_dim and network_alpha. Rank 0: no module."""
        block = block_index(lora_name)
        conv_alpha = 1.0 if self.conv_alpha is None else self.conv_alpha
        ranks, alphas = self.block_dims, self.block_alphas
        if is_3x3:
            dim, alpha, ranks, alphas = self.conv_dim or 0, conv_alpha, self.conv_block_dims, self.conv_block_alphas
        if block is not None:
            dim = ranks[block] if ranks else dim
            alpha = alphas[block] if alphas else alpha
            dim = 0 if self.lr_weights and self.lr_weights[block] == 0 else dim
        return dim, (alpha or dim) * math.sqrt(dim) if self.rs_lora else alpha


READERS: dict[str, Callable[[str], Any]] = {word.name: word.metadata["read"] for word in fields(NetworkArgs)}
# An argument that would do nothing without one of these is an error.
NEEDS = {
    "conv_alpha": ("conv_dim", "conv_block_dims"),
    "block_alphas": ("block_dims", "down_lr_weight", "mid_lr_weight", "up_lr_weight"),
    "conv_block_dims": ("block_dims", "down_lr_weight", "mid_lr_weight", "up_lr_weight"),
    "conv_block_alphas": ("conv_block_dims",),
    "block_lr_zero_threshold": ("down_lr_weight", "mid_lr_weight", "up_lr_weight"),
}


def parse_network_args(
    texts: Mapping[str, Any],
    neuron_dropout: float | None = None,
    readers: Mapping[str, Callable[[str], Any]] = READERS,
    kind: type[NetworkArgs] = NetworkArgs,
) -> NetworkArgs:
    """Read and check the words of `--network_args`; neuron_dropout is `--network_dropout`. ValueError names key and cure.

    readers: how each known word is read; kind: the class of the result.
    """
    given: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in readers:
            close = difflib.get_close_matches(key, readers, n=1)
            cure = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(readers)}"
            raise ValueError(f"unknown network_args key '{key}'; {cure}")
        if text is not None:
            try:
                given[key] = readers[key](str(text))
            except ValueError as error:
                raise ValueError(f"network_args {key}={text}: {error}") from None
    if neuron_dropout is not None and not 0 <= neuron_dropout < 1:
        raise ValueError(f"--network_dropout {neuron_dropout}: must be at least 0 and below 1")
    if neuron_dropout is not None and given.setdefault("dropout", neuron_dropout) != neuron_dropout:
        raise ValueError(f"--network_dropout {neuron_dropout} and network_args dropout={given['dropout']} differ; give one")
    for key, others in NEEDS.items():
        if key in given and not any(other in given for other in others):
            raise ValueError(f"network_args {key} does nothing alone; give {' or '.join(others)} too")
    if "conv_dim" in given and "conv_block_dims" in given:
        raise ValueError("network_args conv_dim and conv_block_dims both say the ranks of 3x3 convolutions; give one of them")
    if given.get("dora") and given.get("init") == "pissa":
        raise ValueError("network_args dora=True and init=pissa cannot be combined; give one of them")
    return kind(**given)


# ---------------------------------------------------------------- making a network


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: nn.Module | None,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> LoRANetwork:
    """A new network of rank network_dim (default 4) and alpha network_alpha (default 1; 0 means the rank).

    network_args are the words of `--network_args`, as text; see `NetworkArgs`. Wrong ones raise ValueError.
    """
    args = parse_network_args(network_args, neuron_dropout)
    return new_network(LoRANetwork, args, multiplier, network_dim, network_alpha, text_encoder, unet)


def new_network(
    kind: type[LoRANetwork],
    args: NetworkArgs,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    text_encoder: nn.Module | None,
    unet: nn.Module | None,
) -> Any:
    """A network of this class with the ranks and alphas that args give to the model's layers."""
    dim, alpha = 4 if network_dim is None else network_dim, 1.0 if network_alpha is None else network_alpha
    if dim < 1 or args.conv_dim == 0:
        raise ValueError(f"{'network_dim' if dim < 1 else 'conv_dim'} must be at least 1")
    layers = find_layers(text_encoder, unet, args.conv3x3)
    ranks = {name: args.rank_and_alpha(name, kernel_size(layer) > 1, dim, alpha) for name, layer in layers.items()}
    ranks = {name: rank for name, rank in ranks.items() if rank[0]}
    classes = dict.fromkeys(ranks, variants().CLASSES[args.variant]) if args.variant else None
    return kind(layers, ranks, multiplier, args, classes)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike | None,
    vae: Any,
    text_encoder: nn.Module | None,
    unet: nn.Module | None,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network with the modules, ranks and alphas of a file, or of weights_sd, and these weights, not yet loaded into it.

    Ranks and alphas in network_args are not used (with a warning). for_inference is in the contract; it changes nothing.
    """
    args = parse_network_args(network_args, neuron_dropout)
    if args.block_dims or args.conv3x3 or args.init or args.rs_lora:
        logger.warning("ranks, alphas and values are those of the weights; the ones in network_args are not used")
    args = replace(args, init=None, rs_lora=None)
    return network_from_weights(LoRANetwork, args, multiplier, file, text_encoder, unet, weights_sd)


def network_from_weights(
    kind: type[LoRANetwork],
    args: NetworkArgs,
    multiplier: float,
    file: str | os.PathLike | None,
    text_encoder: nn.Module | None,
    unet: nn.Module | None,
    weights_sd: dict[str, Tensor] | None,
) -> tuple[Any, dict[str, Tensor]]:
    """A network of this class with the modules, ranks and alphas of weights_sd, or else of the file; and these weights."""
    if weights_sd is None:
        if file is None:
            raise ValueError("create_network_from_weights needs a file or weights_sd")
        weights_sd = load_tensors(file)
    weights_sd = kohya_weights(weights_sd)
    layers = find_layers(text_encoder, unet, conv3x3=True)
    ranks = {}
    for name in names_in_both(weights_sd, layers):
        _, down, alpha = module_weights(weights_sd, name, layers[name])
        ranks[name] = (len(down), alpha)
    classes = {name: variants().CLASSES["dora"] for name in ranks if f"{name}.dora_scale" in weights_sd}
    return kind(layers, ranks, multiplier, args, classes), weights_sd


def variants() -> ModuleType:
    """networks/variants.py, the modules that are more than plain LoRAs. ValueError where this file is used alone."""
    try:
        from networks import variants
    except ImportError:
        variants = None
    if variants is None or variants.LoRAModule is not LoRAModule:
        raise ValueError("DoRA and the other starts need networks/variants.py of the suite; lora.py alone has plain LoRAs")
    return variants


def kernel_size(layer: Layer) -> int:
    """Positions that one output sees: 1 for Linear and 1x1 convolutions, 9 for 3x3."""
    return layer.weight[0, 0].numel()
