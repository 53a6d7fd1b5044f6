"""The suite's LoRA network, which networks/lora.py makes unless it is a copy alone.

It trains by the contract that docs/developing.md has, with a rate for each part and block (lora_training.py). Its modules may be
of other kinds than LoRA: those of variants.py train too, those of adapters.py only act. Files may be in the layouts of other
programs (library/formats/lora_layouts.py); those it writes have the hashes of web UIs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import counted
from library.formats import lora_layouts
from library.formats.adapters.registry import find_adapter
from library.formats.families import titles
from library.formats.foreign import instead_of_a_lora
from library.formats.lora_hashes import with_hashes
from library.formats.lora_layouts import PeftConfig, named_for, with_alphas
from library.formats.tensor_file import open_tensors
from networks.adapters import AdapterModule, all_layers, find_modules
from networks.lora import (
    PLAIN_TENSORS,
    UNET_PREFIX,
    Device,
    DType,
    Layer,
    LoRANetwork,
    TextEncoders,
    UNet,
    Weights,
    find_layers,
    kernel_size,
    matrix_shape,
    merge_module,
    module_weights,
    prefix_of,
    save_tensors,
)
from networks.lora_args import NetworkArgs
from networks.lora_training import limit_norms, optimizer_groups
from networks.suite_module import SuiteModule
from networks.summary import summary
from networks.variants import VARIANTS

logger = logging.getLogger(__name__)


class SuiteNetwork(LoRANetwork):
    """LoRA modules for the layers of a model, and modules of networks/adapters.py for what a file holds beside LoRAs.

    untrained: names of modules that no gradient reaches. Files have them; they are in no optimizer group.
    """

    module_class = SuiteModule

    def __init__(self, modules: Iterable[nn.Module], multiplier: float = 1.0, args: NetworkArgs | None = None):
        super().__init__(modules, multiplier)
        logger.info("LoRA modules: %s", ", ".join(f"{len(modules)} {prefix}" for prefix, modules in self.parts.items()))
        self.args = NetworkArgs() if args is None else args
        self.untrained: frozenset[str] = frozenset()

    @classmethod
    def create(
        cls, args: Any, multiplier: float, dim: int | None, alpha: float | None, text_encoder: TextEncoders, unet: UNet
    ) -> Any:
        dim, alpha = 4 if dim is None else dim, 1.0 if alpha is None else alpha
        if dim < 1 or args.conv_dim == 0:
            raise ValueError(f"{'network_dim' if dim < 1 else 'conv_dim'} must be at least 1")
        layers = find_layers(text_encoder, unet, args.conv3x3)
        args = args.for_layers(layers)
        module_class, modules = args.module_class or cls.module_class, []
        for name, layer in layers.items():
            rank, own_alpha = args.rank_and_alpha(name, kernel_size(layer) > 1, dim, alpha)
            if rank:
                modules.append(module_class(name, layer, rank, own_alpha, **args.dropouts))
        return cls(modules, multiplier, args)

    @classmethod
    def from_weights(cls, args: Any, multiplier: float, weights: Weights, text_encoder: TextEncoders, unet: UNet) -> Any:
        if args.sets_ranks:
            logger.warning("ranks, alphas and values are those of the weights; the ones in network_args are not used")
        weights, layers = lora_layers(weights, text_encoder, unet)
        others = other_modules(weights, layers, text_encoder, unet)
        kinds = modules_in(weights, layers, others)
        modules: list[nn.Module] = []
        for name in [name for name in layers if name in kinds]:
            _, down, alpha = module_weights(weights, name, matrix_shape(layers[name]))
            kind = cls.module_class if kinds[name] is SuiteModule else kinds[name]
            modules.append(kind(name, layers[name], len(down), alpha, **args.dropouts))
        return cls([*modules, *others.values()], multiplier, args.for_layers(layers))

    @property
    def loras(self) -> Sequence[SuiteModule]:
        return list(self.children())  # type: ignore[arg-type]

    @property
    def parts(self) -> dict[str, list[SuiteModule]]:
        """The modules by the prefix of their names: `lora_te`, or `lora_te1` and `lora_te2`, and `lora_unet`."""
        parts: dict[str, list[SuiteModule]] = {}
        for module in self.loras:
            parts.setdefault(prefix_of(module.lora_name), []).append(module)
        return parts

    @property
    def others(self) -> dict[str, AdapterModule]:
        """The modules that are no LoRAs, by name."""
        return {name: module for name, module in self.named_children() if isinstance(module, AdapterModule)}

    def layers_in(self, text_encoder: TextEncoders, unet: UNet) -> dict[str, Any]:
        layers = super().layers_in(text_encoder, unet)
        own = dict(self.named_children())
        return layers if own.keys() <= layers.keys() else all_layers(text_encoder, unet) | layers

    @torch.no_grad()
    def merge_to(
        self, text_encoder: TextEncoders, unet: UNet, weights_sd: Weights, dtype: DType = None, device: Device = None
    ) -> None:
        weights, layers = lora_layers(weights_sd, text_encoder, unet)
        others = other_modules(weights, layers, text_encoder, unet)
        every = all_layers(text_encoder, unet) if others else {}
        for name, module in others.items():
            module.merge(every[name], self.multiplier, dtype, device)
        for name, kind in modules_in(weights, layers, others).items():
            merge_module(kind, weights, name, layers[name], self.multiplier, dtype, device)

    # ---- training

    def leave_out(self, text_encoder: TextEncoders, unet: UNet, parts: Iterable[nn.Module]) -> None:
        """Drop the modules of layers inside `parts`: neither trained nor saved."""
        for name in self._inside(text_encoder, unet, parts):
            delattr(self, name)

    def leave_untrained(self, text_encoder: TextEncoders, unet: UNet, unread: Iterable[nn.Module]) -> None:
        """Leave out of training and norms the modules of layers inside `unread`, which no gradient reaches."""
        self.untrained = self._inside(text_encoder, unet, unread)

    def _inside(self, text_encoder: TextEncoders, unet: UNet, parts: Iterable[nn.Module]) -> frozenset[str]:
        """Names of the modules whose layers are inside `parts`."""
        inside = {id(layer) for part in parts for layer in part.modules()}
        layers = self.layers_in(text_encoder, unet)
        return frozenset(m.lora_name for m in self.loras if id(layers[m.lora_name]) in inside)

    @property
    def trained(self) -> list[SuiteModule]:
        return [module for module in self.loras if module.lora_name not in self.untrained]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | list[float] | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their names for the log, see `optimizer_groups`."""
        learning = {prefix: [m for m in part if m.lora_name not in self.untrained] for prefix, part in self.parts.items()}
        return optimizer_groups(learning, self.args, text_encoder_lr, unet_lr, default_lr)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the modules are recomputed with the model's own checkpoints, to which they are attached."""

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: UNet) -> None:
        for module in self.loras:
            module.requires_grad_(module.lora_name not in self.untrained)

    def on_epoch_start(self, text_encoder: TextEncoders, unet: UNet) -> None:
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for module in self.trained for parameter in module.parameters()]

    def apply_max_norm_regularization(self, max_norm: float, device: Device = None) -> tuple[Tensor, Tensor, Tensor]:
        """Shrink every trained module whose product has a norm above max_norm, see `limit_norms`."""
        return limit_norms(self.trained, max_norm)

    def summary(self, dtype: DType = None) -> str:
        """Modules, ranks, trainable parameters, the size of the file in this dtype (None: as it is); a chart if blocks differ."""
        return summary(self.parts, self.args, dtype)

    # ---- files

    def save_weights(self, file: str | os.PathLike, dtype: DType, metadata: Mapping[str, str] | None) -> None:
        """Write the file, whole or not at all; see `save_tensors`. dtype None keeps the weights' own."""
        tensors = self.tensors(dtype)
        if metadata is not None and Path(file).suffix == ".safetensors":
            metadata = with_hashes(tensors, {**metadata, **self._stored_ranks(metadata)})
        save_tensors(tensors, file, metadata)

    def _stored_ranks(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Rank and alpha as files have them, where they differ from those that the modules were given."""
        if "ss_network_dim" not in metadata or getattr(self.loras[0], "stores_as_given", True):
            return {}
        first = self.loras[0].file_weights()
        return {"ss_network_dim": str(len(first["lora_down.weight"])), "ss_network_alpha": str(first["alpha"].item())}

    @classmethod
    def read(cls, file: str | os.PathLike) -> dict[str, Tensor]:
        """The tensors of a file in any layout, by their own names: those of layers here depend on the model."""
        with open_tensors(Path(file)) as content:
            tensors = {name: content.read(name) for name in content.shapes}
            return with_alphas(tensors, PeftConfig(Path(file), content.metadata))

    def load_weights(self, file: str | os.PathLike) -> Any:
        """Load a file; the alphas, and so the scales, are the file's. Returns the missing and the unexpected keys."""
        modules = dict(self.named_children())
        weights = self._named(self.read(file))
        if other := _untrained_kind(weights):
            raise ValueError(other)
        modules_in(weights, modules)
        result = self.load_state_dict(weights, strict=False)
        conv3x3 = {k: t for k, t in weights.items() if k.endswith(".lora_down.weight") and t.dim() == 4 and t[0, 0].numel() > 1}
        unet = self.parts.get(UNET_PREFIX)
        if conv3x3 and unet and all(kernel_size(module.lora_down) == 1 for module in unet):
            rank = len(next(iter(conv3x3.values())))
            raise ValueError(
                f"{file} has 3x3 convolutions, this network has none; use --dim_from_weights or --network_args conv_dim={rank}"
            )
        return result

    def load_state_dict(self, state_dict: Weights, strict: bool = True, assign: bool = False) -> Any:
        """As torch's, for files of any layout: alpha may be missing (then it is the rank); Linear and 1x1 convolution fit."""
        named, others = self._named(state_dict), self.others
        fitted = {key: tensor for key, tensor in named.items() if key.partition(".")[0] not in others}  # they have them
        for name, module in self.named_children():
            for kind in VARIANTS:
                if kind.fits(fitted, name) and not isinstance(module, kind):
                    option = f"use --dim_from_weights or --network_args {kind.option()}"
                    raise ValueError(f"{name} is a {kind.title} in the weights; {option}")
        return super().load_state_dict(fitted, strict=strict, assign=assign)

    def own_weights(self, weights: Weights) -> dict[str, Tensor]:
        return super().own_weights(self._named(weights))

    def _named(self, weights: Weights) -> dict[str, Tensor]:
        return named_for(weights, dict(self.named_children()), self.args.resnets)


# ---------------------------------------------------------------- what weights hold


def lora_layers(weights: Weights, text_encoder: TextEncoders, unet: UNet) -> tuple[dict[str, Tensor], dict[str, Layer]]:
    """The weights by the names of the model's layers, and the layers for which they can hold a LoRA.

    These are the layers that get one in training here, and others that have one in the weights: conv_in, conv_out, the time
    embedding and the projection of a text encoder, say.
    """
    layers = find_layers(text_encoder, unet, conv3x3=True)
    named = named_for(weights, layers)
    ending = ".lora_down.weight"
    if all(key.removesuffix(ending) in layers for key in named if key.endswith(ending)):
        return named, layers
    every = all_layers(text_encoder, unet)
    named = named_for(weights, every)
    outside = {name: layer for name, layer in every.items() if isinstance(layer, Layer) and f"{name}{ending}" in named}
    return named, layers | outside


def other_modules(
    weights: Weights, layers: Mapping[str, Layer], text_encoder: TextEncoders, unet: UNet
) -> dict[str, AdapterModule]:
    """What these weights hold for the model beside LoRAs of `layers`, by LoRA name."""
    plain = (".alpha", ".lora_down.weight", ".lora_up.weight", ".dora_scale")
    if all(key.endswith(plain) and key.partition(".")[0] in layers for key in weights):
        return {}
    return find_modules(weights, layers, text_encoder, unet)


def modules_in(
    weights: Weights, known: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> dict[str, type[SuiteModule]]:
    """The LoRA modules of these weights that `known` has too, and their kind. Warns of unused tensors; ValueError if all are.

    others: what `other_modules` gave.
    """
    others = others or {}
    weights = {key: tensor for key, tensor in weights.items() if key.partition(".")[0] not in others}
    names = [key.removesuffix(".lora_down.weight") for key in weights if key.endswith(".lora_down.weight")]
    pairs = {name: (weights[f"{name}.lora_down.weight"], weights.get(f"{name}.lora_up.weight")) for name in names}
    kinds = {
        name: SuiteModule
        for name, (down, up) in pairs.items()
        if name in known and down.numel() and up is not None and up.numel()  # a rank of 0 adds nothing
    }
    if not kinds and not others:
        raise ValueError(
            f"none of these weights ({counted(len(names), 'LoRA module')}, {counted(len(weights), 'tensor')}) "
            "has a layer in this model; "
            + (_other_families(weights, known) or _instead(weights) or "are they a LoRA for this model?")
        )
    unused = []
    for key in weights:
        name, _, tensor = key.partition(".")
        if name not in kinds:
            unused.append(key)
        elif tensor not in (*PLAIN_TENSORS, *getattr(kinds[name], "own_tensors", ())):
            kind = next((kind for kind in VARIANTS if tensor in kind.own_tensors), None)
            if kind is None:
                raise ValueError(f"{key} is not supported; {_instead(weights) or 'it is not part of a plain LoRA'}")
            kinds[name] = kind
    if unused:
        logger.warning("this model has no layer for %d of %d tensors, such as %s", len(unused), len(weights), unused[0])
    return kinds


def _other_families(weights: Weights, layers: Mapping[str, Any]) -> str:
    """`they are a LoRA for SDXL`, say, if these layers are of another family; empty if that is not known."""
    found = lora_layouts.other_families(weights, layers)
    return f"they are a LoRA for {titles(found)}" if found else ""


def _instead(weights: Weights) -> str:
    """`they are a LoHa file`, say; empty if that is not known."""
    if found := instead_of_a_lora(weights):
        return f"they are {found[0]}"
    return _untrained_kind(weights)


def _untrained_kind(weights: Weights) -> str:
    """That networks.lora does not train the first layer of another kind, with the cure; empty if all layers have LoRAs."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        layer, _, inside = key.partition(".")
        if layer.startswith(lora_layouts.KOHYA):
            layers.setdefault(layer, {})[inside] = tensor
    for layer, parts in layers.items():
        adapter = find_adapter(layer, parts)
        if adapter is not None and adapter.kind.name != "LoRA":
            return f"{layer} ({adapter.title}) is nothing that networks.lora trains; use lycoris.kohya"
    return ""
