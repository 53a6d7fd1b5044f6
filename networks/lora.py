"""LoRA networks for Stable Diffusion: made, trained, saved, loaded, applied and merged.

LoRA (Hu et al. 2021, arXiv 2106.09685) leaves a layer W frozen and learns a low-rank addition to it:

    y = W(x) + multiplier * (alpha / rank) * up(down(x))

By default ("LierLa") the Linear and 1x1 convolution layers of the text encoders' and the U-Net's attention blocks get one;
with `conv_dim` ("C3Lier") so do the layers of the U-Net's residual blocks and samplers, 3x3 convolutions included.
Files hold `<name>.alpha`, `<name>.lora_down.weight` and `<name>.lora_up.weight`; `<name>` is the layer's path with
underscores. This file needs torch and safetensors alone, and works copied beside any script:

    network, weights = create_network_from_weights(0.8, "mine.safetensors", vae, text_encoder, unet)
    network.apply_to(text_encoder, unet)          # or: network.merge_to(text_encoder, unet, weights), for good
    network.load_state_dict(weights)
    ...
    network.set_multiplier(0.5)
    network.unapply()                             # the model is as it was

Several text encoders are given as a list, wherever one is. What only the suite needs is beside this file, and fetched by `suite`:
words of --network_args (lora_args), other kinds of modules (variants), faster training (fused), the report (summary), and, in
library/formats, the layouts of other programs and the hashes of web UIs. A copy alone does without, or names the file it lacks.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import os
import pickle
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
TextEncoders = nn.Module | list | tuple | None  # of several, any may be None


def suite(module: str, purpose: str | None = None) -> Any:
    """A module of the suite. Where this file is a copy alone: None, or if a purpose is given ValueError, which names the file."""
    if __name__ == "networks.lora":
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("networks", "library"):
                raise
    if purpose is None:
        return None
    raise ValueError(f"{purpose} needs {module.replace('.', '/')}.py of the suite; this copy of lora.py does without it")


# ---------------------------------------------------------------- which layers, and what they are called


def find_layers(text_encoder: TextEncoders, unet: nn.Module | None, conv3x3: bool = False) -> dict[str, Layer]:
    """The layers that can get a LoRA, by LoRA name, in the order in which files list them.

    Names begin with `lora_te`, or of several text encoders with `lora_te1`, `lora_te2`, and with `lora_unet`.
    """
    blocks = UNET_BLOCKS_3X3 if conv3x3 else UNET_BLOCKS
    layers: dict[str, Layer] = {}
    for prefix, part in named_parts(text_encoder, unet).items():
        layers |= _layers_in(part, prefix, blocks if prefix == UNET_PREFIX else TEXT_ENCODER_BLOCKS)
    return layers


def named_parts(text_encoder: TextEncoders, unet: nn.Module | None) -> dict[str, nn.Module | None]:
    """The parts of the model by the prefix of their LoRA names, in the order of files."""
    encoders = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]
    numbers = range(1, len(encoders) + 1) if len(encoders) > 1 else [""]
    prefixes = [*(f"{TEXT_ENCODER_PREFIX}{number}" for number in numbers), UNET_PREFIX]
    return dict(zip(prefixes, [*encoders, unet], strict=True))


def prefix_of(lora_name: str) -> str:
    """The part of the model that a LoRA name is of: `lora_unet`, `lora_te`, `lora_te1` or `lora_te2`."""
    return "_".join(lora_name.split("_", 2)[:2])


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
            names[lora_path(path, prefix)] = paths[path]
    return names


def lora_path(path: str, prefix: str) -> str:
    """The LoRA name of the layer at this path in the part of the model that has the prefix."""
    return f"{prefix}_{_standard_path(path, prefix).replace('.', '_')}"


def _transformer_block(path: str) -> str:
    """`...transformer_blocks.0.attn1.to_q` -> `...transformer_blocks.0`; any other path as it is."""
    parts = path.split(".")
    return ".".join(parts[: parts.index("transformer_blocks") + 2]) if "transformer_blocks" in parts else path


def _standard_path(path: str, prefix: str) -> str:
    """The path as files have it: transformers 5.6 dropped the `text_model` level of `CLIPTextModel`, files keep it."""
    return f"text_model.{path}" if prefix != UNET_PREFIX and not path.startswith("text_model.") else path


def kernel_size(layer: Layer) -> int:
    """Positions that one output sees: 1 for Linear and 1x1 convolutions, 9 for 3x3."""
    return layer.weight[0, 0].numel()


# ---------------------------------------------------------------- one layer


class LoRAModule(nn.Module):
    """The low-rank addition to one Linear or Conv2d layer. `forward` gives the addition alone.

    Shapes: Linear in -> out has down (rank, in) and up (out, rank); Conv2d k x k has down (rank, in, k, k), with the layer's
    stride and padding, and up (out, rank, 1, 1). `down` starts uniform in +-1/sqrt(fan_in), `up` at zero: so the start is
    the base model. All three dropouts act in training mode only.

    own_tensors: what files hold of this kind of modules beside alpha, lora_down.weight and lora_up.weight; it tells the kind.
    stores_as_given: whether files hold rank and alpha as the module was given them.
    """

    own_tensors: tuple[str, ...] = ()
    stores_as_given = True
    alpha: Tensor

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
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            self.lora_down: Layer = nn.Conv2d(layer.in_channels, rank, *window, bias=False)  # type: ignore[arg-type]
            self.lora_up: Layer = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.read_scale()
        self.hook: Any = None

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
        fused = suite("networks.fused")
        self._joined = fused.joined if fused else None
        self.hook = layer.register_forward_hook(self._add)

    def _add(self, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.is_idle():
            return output
        joined = self._joined(self, layer, inputs[0], output) if self._joined else None
        return output + self(inputs[0]).to(output.dtype) if joined is None else joined

    def detach(self) -> None:
        """Undo `attach`."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

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
        variants = suite("networks.variants")
        for kind in variants.VARIANTS if variants else ():
            if kind.fits(weights, self.lora_name) and not isinstance(self, kind):
                option = f"use --dim_from_weights or --network_args {kind.option()}"
                raise ValueError(f"{self.lora_name} is a {kind.title} in the weights; {option}")
        shaped = {
            "lora_up.weight": up.reshape(self.lora_up.weight.shape),
            "lora_down.weight": down.reshape(self.lora_down.weight.shape),
        }
        return {"alpha": torch.tensor(alpha), **shaped}

    @classmethod
    def fits(cls, weights: Mapping[str, Tensor], name: str) -> bool:
        """Whether the module of this name is of this kind in the weights of a file: those of plain LoRAs tell nothing."""
        return any(f"{name}.{tensor}" in weights for tensor in cls.own_tensors)

    @classmethod
    def weight_change(cls, weights: Mapping[str, Tensor], name: str, layer: Layer, device: Any = None) -> Tensor:
        """What the module of this name adds to the weight of this layer, in float32 and the weight's shape."""
        return weight_delta(*module_weights(weights, name, layer), device=device).view(layer.weight.shape)


# ---------------------------------------------------------------- network_args


PLAIN_WORDS = {"conv_dim": int, "conv_alpha": float, "dropout": float, "rank_dropout": float, "module_dropout": float}


@dataclass(frozen=True)
class PlainArgs:
    """What `--network_args` can say to this file alone. None: not given."""

    conv_dim: int | None = None
    conv_alpha: float | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None

    @property
    def dropouts(self) -> dict[str, Any]:
        kinds = ("dropout", "rank_dropout", "module_dropout")
        return {kind: getattr(self, kind) or 0.0 for kind in kinds}

    @property
    def conv3x3(self) -> bool:
        return self.conv_dim is not None

    @property
    def says_ranks(self) -> bool:
        """Whether they say something about ranks or start that weights of a file say too."""
        return self.conv3x3

    @property
    def module_class(self) -> type[LoRAModule] | None:
        """The class of the modules, if it is not the network's usual one."""
        return None

    def for_layers(self, lora_names: Iterable[str]) -> PlainArgs:
        """These words for a model with layers of these names."""
        return self

    def rank_and_alpha(self, lora_name: str, is_3x3: bool, dim: int, alpha: float) -> tuple[int, float]:
        """What a layer gets, given network_dim and network_alpha. Rank 0: no module."""
        return (self.conv_dim or 0, 1.0 if self.conv_alpha is None else self.conv_alpha) if is_3x3 else (dim, alpha)


def parse_network_args(words: Mapping[str, Any], neuron_dropout: float | None = None) -> PlainArgs:
    """Read and check the words of `--network_args`; neuron_dropout is `--network_dropout`. ValueError names key and cure."""
    if lora_args := suite("networks.lora_args"):
        return lora_args.parse_network_args(words, neuron_dropout)
    given = {word: text for word, text in words.items() if text is not None}
    if neuron_dropout is not None:
        given["dropout"] = neuron_dropout
    for word in given:
        if word not in PLAIN_WORDS:
            suite("networks.lora_args", f"network_args {word}")
    args = PlainArgs(**{word: PLAIN_WORDS[word](text) for word, text in given.items()})
    if wrong := next((word for word, share in args.dropouts.items() if not 0 <= share < 1), None):
        raise ValueError(f"{wrong}={given[wrong]}: must be at least 0 and below 1")
    return args


# ---------------------------------------------------------------- the network


class LoRANetwork(nn.Module):
    """LoRA modules for the layers of a model, as one module with one state.

    layers: what `find_layers` gave; ranks: (rank, alpha) by LoRA name, for those layers that get a module; classes: of those
    modules that are not of the network's usual class; others: modules of networks/adapters.py, for what is no LoRA. `untrained`
    names modules that no gradient reaches: files have them.
    """

    module_class = LoRAModule

    def __init__(
        self,
        layers: Mapping[str, Layer],
        ranks: Mapping[str, tuple[int, float | None]],
        multiplier: float = 1.0,
        args: PlainArgs | None = None,
        classes: Mapping[str, type[LoRAModule]] | None = None,
        others: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.multiplier = multiplier
        self.args: Any = parse_network_args({}).for_layers(layers) if args is None else args
        self.untrained: frozenset[str] = frozenset()
        for name, layer in layers.items():
            if name in ranks:
                module_class = (classes or {}).get(name, self.module_class)
                self.add_module(name, module_class(name, layer, *ranks[name], multiplier, **self.args.dropouts))
        for name, module in (others or {}).items():
            module.multiplier = multiplier
            self.add_module(name, module)
        if not self.loras:
            raise ValueError("no layer for a LoRA was found in the text encoder and U-Net; are they of Stable Diffusion?")
        logger.info("LoRA modules: %s", ", ".join(f"{len(modules)} {prefix}" for prefix, modules in self.parts.items()))

    @classmethod
    def create(
        cls, args: PlainArgs, multiplier: float, dim: int | None, alpha: float | None, text_encoder: TextEncoders, unet: Any
    ) -> Any:
        """A new network with the ranks and alphas that args give to the model's layers."""
        dim, alpha = 4 if dim is None else dim, 1.0 if alpha is None else alpha
        if dim < 1 or args.conv_dim == 0:
            raise ValueError(f"{'network_dim' if dim < 1 else 'conv_dim'} must be at least 1")
        layers = find_layers(text_encoder, unet, args.conv3x3)
        args = args.for_layers(layers)
        ranks = {name: args.rank_and_alpha(name, kernel_size(layer) > 1, dim, alpha) for name, layer in layers.items()}
        ranks = {name: rank for name, rank in ranks.items() if rank[0]}
        return cls(layers, ranks, multiplier, args, dict.fromkeys(ranks, args.module_class or cls.module_class))

    @classmethod
    def from_weights(
        cls, args: PlainArgs, multiplier: float, weights: Mapping[str, Tensor], text_encoder: TextEncoders, unet: Any
    ) -> Any:
        """A network with the modules, ranks and alphas of these weights."""
        layers, ranks = find_layers(text_encoder, unet, conv3x3=True), {}
        others = other_modules(weights, layers, text_encoder, unet)
        weights = named_for(weights, layers)
        kinds = modules_in(weights, layers, others)
        for name in kinds:
            _, down, alpha = module_weights(weights, name, layers[name])
            ranks[name] = (len(down), alpha)
        classes = {name: kind for name, kind in kinds.items() if kind is not LoRAModule}
        return cls(layers, ranks, multiplier, args.for_layers(layers), classes, others)

    @property
    def others(self) -> dict[str, Any]:
        """The modules that are no LoRAs, of networks/adapters.py, by name."""
        return {name: module for name, module in self.named_children() if not isinstance(module, LoRAModule)}

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a file's weights that are of modules of this network, by its names."""
        modules = dict(self.named_children())
        return {key: t for key, t in named_for(kohya_weights(weights), modules).items() if key.partition(".")[0] in modules}

    @property
    def loras(self) -> Sequence[LoRAModule]:
        return list(self.children())  # type: ignore[arg-type]

    @property
    def parts(self) -> dict[str, list[LoRAModule]]:
        """The modules by the prefix of their names: `lora_te`, or `lora_te1` and `lora_te2`, and `lora_unet`."""
        parts: dict[str, list[LoRAModule]] = {}
        for module in self.loras:
            parts.setdefault(prefix_of(module.lora_name), []).append(module)
        return parts

    # ---- on and off

    def apply_to(
        self, text_encoder: TextEncoders, unet: nn.Module | None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Attach the modules to the model's layers. Parts not applied are dropped: neither trained nor saved."""
        for module in self.loras:
            if not (apply_unet if prefix_of(module.lora_name) == UNET_PREFIX else apply_text_encoder):
                delattr(self, module.lora_name)
        self.unapply()
        layers: dict[str, Any] = find_layers(text_encoder, unet, conv3x3=True)
        if self.others:
            layers = suite("networks.adapters").all_layers(text_encoder, unet) | layers
        for module in self.loras:
            if module.lora_name not in layers:
                missing = f"the model has no layer for the LoRA module {module.lora_name}"
                raise ValueError(f"{missing}; was the network made for another model?")
            module.attach(layers[module.lora_name])

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
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Change the model's layers for good: W += multiplier * alpha / rank * up down, in float32.

        dtype: round the result to this first (the layers keep their own type); device: calculate there.
        """
        layers = find_layers(text_encoder, unet, conv3x3=True)
        weights = kohya_weights(weights_sd)
        others = other_modules(weights, layers, text_encoder, unet)
        if others:
            every = suite("networks.adapters").all_layers(text_encoder, unet)
            for name, module in others.items():
                module.merge(every[name], self.multiplier, dtype, device)
        weights = named_for(weights, layers)
        for name, kind in modules_in(weights, layers, others).items():
            weight = layers[name].weight
            change = kind.weight_change(weights, name, layers[name], device or weight.device)
            merged = weight.to(change) + self.multiplier * change
            weight.copy_(merged.to(dtype or weight.dtype))

    # ---- training

    def prepare_optimizer_params(
        self, text_encoder_lr: float | list[float] | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their names for the log, see networks/lora_training.py."""
        training = suite("networks.lora_training", "an optimizer with a rate for each part")
        return training.optimizer_groups(self, text_encoder_lr, unet_lr, default_lr)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the modules are recomputed with the model's own checkpoints, to which they are attached."""

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: nn.Module | None) -> None:
        for module in self.loras:
            module.requires_grad_(module.lora_name not in self.untrained)

    def on_epoch_start(self, text_encoder: TextEncoders, unet: nn.Module | None) -> None:
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [p for module in self.loras if module.lora_name not in self.untrained for p in module.parameters()]

    def apply_max_norm_regularization(self, max_norm: float, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Shrink every module whose product has a norm above max_norm, see networks/lora_training.py."""
        return suite("networks.lora_training", "a largest norm").limit_norms(self.loras, max_norm)

    # ---- files

    def save_weights(self, file: str | os.PathLike, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the file, whole or not at all; see `save_tensors`. dtype None keeps the weights' own."""
        tensors = {key: t.to("cpu", dtype or t.dtype).contiguous() for key, t in self.file_weights().items()}
        if metadata and "ss_network_dim" in metadata and not self.loras[0].stores_as_given:
            first = self.loras[0].file_weights()
            facts = {"ss_network_dim": len(first["lora_down.weight"]), "ss_network_alpha": first["alpha"].item()}
            metadata = {**metadata, **{key: str(value) for key, value in facts.items()}}
        save_tensors(tensors, file, metadata)

    def file_weights(self) -> dict[str, Tensor]:
        """The tensors of the file, as any loader takes them."""
        return {f"{module.lora_name}.{key}": t for module in self.loras for key, t in module.file_weights().items()}

    def load_weights(self, file: str | os.PathLike) -> Any:
        """Load a file; the alphas, and so the scales, are the file's. Returns the missing and the unexpected keys."""
        if self.others:
            name, module = next(iter(self.others.items()))
            raise ValueError(f"{name} ({module.adapter.title}) is nothing that networks.lora trains; use lycoris.kohya")
        modules = dict(self.named_children())
        weights = named_for(load_tensors(file), modules)
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

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, for files of any layout: alpha may be missing (then it is the rank); Linear and 1x1 convolution fit."""
        fitted = named_for(kohya_weights(state_dict), dict(self.named_children()))
        fitted = {key: tensor for key, tensor in fitted.items() if key.partition(".")[0] not in self.others}  # they have them
        for module in self.loras:
            name = module.lora_name
            if f"{name}.lora_down.weight" in fitted and f"{name}.lora_up.weight" in fitted:
                fitted |= {f"{name}.{key}": tensor for key, tensor in module.from_file(fitted).items()}
        result = super().load_state_dict(fitted, strict=strict, assign=assign)
        for module in self.loras:
            module.read_scale()
        return result

    def summary(self, dtype: torch.dtype | None = None) -> str:
        """Modules, ranks, trainable numbers, the size of the file in this dtype (None: as it is); a chart if blocks differ."""
        return suite("networks.summary", "the summary of a network").summary(self, dtype)


# ---------------------------------------------------------------- weights as tensors


def weight_delta(up: Tensor, down: Tensor, alpha: float, device: Any = None) -> Tensor:
    """alpha / rank * up down in float32: (out, in), or (out, in, k, k) for a convolution."""
    up, down = up.to(device, torch.float32), down.to(device, torch.float32)
    return (up.flatten(1) @ down.flatten(1)).mul_(alpha / down.shape[0]).view(up.shape[0], *down.shape[1:])


def other_modules(
    weights: Mapping[str, Tensor], layers: Mapping[str, Layer], text_encoder: TextEncoders, unet: nn.Module | None
) -> dict[str, Any]:
    """What these weights hold for the model beside LoRAs of `layers`, by LoRA name; nothing where this file is a copy alone."""
    plain = (".alpha", ".lora_down.weight", ".lora_up.weight", ".dora_scale")
    if all(key.endswith(plain) and key.partition(".")[0] in layers for key in weights):
        return {}
    adapters = suite("networks.adapters")
    return adapters.find_modules(weights, layers, text_encoder, unet) if adapters else {}


def modules_in(
    weights: Mapping[str, Tensor], known: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> dict[str, type[LoRAModule]]:
    """The LoRA modules of these weights that `known` has too, and their kind. Warns of unused tensors; ValueError if all are.

    others: what `other_modules` gave.
    """
    others = others or {}
    weights = {key: tensor for key, tensor in weights.items() if key.partition(".")[0] not in others}
    plain = ("alpha", "lora_down.weight", "lora_up.weight")
    names = [key.removesuffix(".lora_down.weight") for key in weights if key.endswith(".lora_down.weight")]
    pairs = {name: (weights[f"{name}.lora_down.weight"], weights.get(f"{name}.lora_up.weight")) for name in names}
    kinds = {
        name: LoRAModule
        for name, (down, up) in pairs.items()
        if name in known and down.numel() and up is not None and up.numel()  # a rank of 0 adds nothing
    }
    if not kinds and not others:
        raise ValueError(
            f"none of these weights ({len(names)} LoRA modules, {len(weights)} tensors) has a layer in this model; "
            + (_instead(weights) or "are they a LoRA for this model?")
        )
    unused = []
    for key in weights:
        name, _, tensor = key.partition(".")
        if name not in kinds:
            unused.append(key)
        elif tensor not in (*plain, *kinds[name].own_tensors):
            variants = suite("networks.variants", f"{key}, which no plain LoRA has,").VARIANTS
            kind = next((kind for kind in variants if tensor in kind.own_tensors), None)
            if kind is None:
                raise ValueError(f"{key} is not supported; {_instead(weights) or 'it is not part of a plain LoRA'}")
            kinds[name] = kind
    if unused:
        logger.warning("%d of %d tensors have no layer in this model, such as %s", len(unused), len(weights), unused[0])
    return kinds


def _instead(weights: Mapping[str, Tensor]) -> str:
    """`they are a LoHa file`, say; empty if nothing tells."""
    foreign = suite("library.formats.foreign")
    if found := foreign.instead_of_a_lora(weights) if foreign else None:
        return f"they are {found[0]}"
    registry = suite("library.formats.adapters.registry")
    layer = next(iter(weights), "").partition(".")[0]
    parts = {key.partition(".")[2]: tensor for key, tensor in weights.items() if key.startswith(f"{layer}.")}
    adapter = registry.find_adapter(layer, parts) if registry else None
    if adapter is None or adapter.kind.name == "LoRA":
        return ""
    return f"{layer} ({adapter.title}) is nothing that networks.lora trains; use lycoris.kohya"


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
    file = Path(file)
    metadata: dict[str, str] = {}
    try:
        with open(file, "rb") as stream:
            is_safetensors = stream.read(9)[8:] == b"{"  # the length of the header in 8 bytes, and the header
        if is_safetensors:
            with safetensors.safe_open(file, "pt") as content:
                metadata = content.metadata() or {}
                tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (it is no dictionary)
        else:
            with open(file, "rb") as stream:  # opened here, since torch would choose a format by the name
                tensors = torch.load(stream, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    except FileNotFoundError:
        raise ValueError(f"there is no file {file}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is damaged or no weights file ({reason}); fetch or save it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is no LoRA file: it does not hold tensors by name")
    return kohya_weights(tensors, file, metadata)


def save_tensors(tensors: Mapping[str, Tensor], file: str | os.PathLike, metadata: Mapping[str, str] | None) -> None:
    """Write tensors to .safetensors, with metadata and, in the suite, its hashes; or to .ckpt/.pt, a plain dictionary.

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
            if metadata is not None:  # what is no Unicode in it (a file's name, say) cannot be written, and becomes "?"
                metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
                hashes = suite("library.formats.lora_hashes")
                metadata = hashes.with_hashes(tensors, metadata) if hashes else metadata
            safetensors.torch.save_file(dict(tensors), temporary, metadata)  # type: ignore[arg-type]
        elif writer := suite("library.formats.tensor_output"):
            writer.save_pickled(tensors, temporary)  # as the A1111 web UI takes it, whose loader refuses what torch.save adds
        else:
            torch.save(dict(tensors), temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def named_for(weights: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by the names of these layers, where files name them otherwise: `lora_te1_...`, `lora_unet_input_blocks_...`."""
    is_plain = all(key.partition(".")[0] in layers for key in weights)
    layouts = None if is_plain else suite("library.formats.lora_layouts")
    return layouts.named_for(weights, layers) if layouts else dict(weights)


def kohya_weights(
    weights: Mapping[str, Tensor], file: Path | None = None, metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The weights by the names that this file's networks have; names in no known layout stay as they are.

    file, metadata: where the weights are from, and where other programs write down their alphas.
    """
    kohya = [key for key in weights if key.startswith("lora_")]
    if len(kohya) < len(weights):
        purpose = None if kohya else f"the key {next(iter(weights))}, which is not in kohya's layout,"
        if layouts := suite("library.formats.lora_layouts", purpose):
            others = {key: tensor for key, tensor in weights.items() if not key.startswith("lora_")}
            named = layouts.kohya_weights(others, layouts.PeftConfig(file, metadata or {}) if file else None)
            return {key: weights[key] for key in kohya} | named
    return dict(weights)


# ---------------------------------------------------------------- making a network


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> LoRANetwork:
    """A new network of rank network_dim (default 4) and alpha network_alpha (default 1; 0 means the rank).

    network_args are the words of `--network_args`, as text; see `PlainArgs` and networks/lora_args.py. ValueError for wrong ones.
    """
    args = parse_network_args(network_args, neuron_dropout)
    return LoRANetwork.create(args, multiplier, network_dim, network_alpha, text_encoder, unet)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike | None,
    vae: Any,
    text_encoder: TextEncoders,
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
    weights = weights_or_file(weights_sd, file)
    network = LoRANetwork.from_weights(args, multiplier, weights, text_encoder, unet)
    if args.says_ranks:
        logger.warning("ranks, alphas and values are those of the weights; the ones in network_args are not used")
    return network, network.own_weights(weights)


def weights_or_file(weights_sd: Mapping[str, Tensor] | None, file: str | os.PathLike | None) -> dict[str, Tensor]:
    """weights_sd by kohya's names, or else the weights of the file."""
    if weights_sd is not None:
        return kohya_weights(weights_sd)
    if file is None:
        raise ValueError("create_network_from_weights needs a file or weights_sd")
    return load_tensors(file)
