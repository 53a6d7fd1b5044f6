"""LoRA networks for Stable Diffusion: made, saved, loaded, applied and merged.

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

Several text encoders are given as a list, wherever one is. In the suite `create_network` makes networks of the class
`SuiteNetwork` (networks/suite_network.py), which trains by the suite's options and reads other programs' files.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TEXT_ENCODER_PREFIX = "lora_te"
UNET_PREFIX = "lora_unet"
TEXT_ENCODER_BLOCKS = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})
UNET_BLOCKS = frozenset({"Transformer2DModel"})
UNET_BLOCKS_3X3 = UNET_BLOCKS | {"ResnetBlock2D", "Downsample2D", "Upsample2D"}

PLAIN_TENSORS = ("alpha", "lora_down.weight", "lora_up.weight")  # of a module in a file
Layer = nn.Linear | nn.Conv2d
TextEncoders = nn.Module | list | tuple | None  # of several, any may be None
UNet = nn.Module | None
Weights = Mapping[str, Tensor]  # by their names in a file
DType = torch.dtype | None
Device = torch.device | str | None


def suite(module: str) -> Any:
    """A module of the suite; None where this file is a copy alone."""
    return importlib.import_module(module) if __name__ == "networks.lora" else None


# ---------------------------------------------------------------- which layers, and what they are called


def find_layers(text_encoder: TextEncoders, unet: UNet, conv3x3: bool = False) -> dict[str, Layer]:
    """The layers that can get a LoRA, by LoRA name, in the order in which files list them.

    Names begin with `lora_te`, or of several text encoders with `lora_te1`, `lora_te2`, and with `lora_unet`.
    """
    layers: dict[str, Layer] = {}
    for prefix, part in named_parts(text_encoder, unet).items():
        unet_blocks = UNET_BLOCKS_3X3 if conv3x3 else UNET_BLOCKS
        paths = _layers_in(part, unet_blocks if prefix == UNET_PREFIX else TEXT_ENCODER_BLOCKS)
        # Files list a transformer block as attn1, ff, attn2; today's Diffusers holds it as attn1, attn2, ff.
        for _, block in itertools.groupby(paths, key=_transformer_block):
            layers |= {lora_path(path, prefix): paths[path] for path in sorted(block, key=lambda path: ".attn2." in path)}
    return layers


def named_parts(text_encoder: TextEncoders, unet: UNet) -> dict[str, nn.Module]:
    """The parts of the model that are given, by the prefix of their LoRA names, in the order of files."""
    encoders = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]
    numbers = range(1, len(encoders) + 1) if len(encoders) > 1 else [""]
    prefixes = [*(f"{TEXT_ENCODER_PREFIX}{number}" for number in numbers), UNET_PREFIX]
    return {prefix: part for prefix, part in zip(prefixes, [*encoders, unet], strict=True) if part is not None}


def prefix_of(lora_name: str) -> str:
    """The part of the model that a LoRA name is of: `lora_unet`, `lora_te`, `lora_te1` or `lora_te2`."""
    return "_".join(lora_name.split("_", 2)[:2])


def lora_path(path: str, prefix: str) -> str:
    """The LoRA name of the layer at this path in the part of the model that has the prefix."""
    if prefix != UNET_PREFIX and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"  # transformers 5.6 dropped this level of `CLIPTextModel`, files keep it
    return f"{prefix}_{path.replace('.', '_')}"


def _layers_in(part: nn.Module, block_classes: frozenset[str]) -> dict[str, Layer]:
    """The layers inside of all blocks of these classes, by path."""
    blocks = [(path, block) for path, block in part.named_modules() if type(block).__name__ in block_classes]
    modules = itertools.chain(*(block.named_modules(prefix=path) for path, block in blocks))
    return {path: module for path, module in modules if isinstance(module, Layer)}


def _transformer_block(path: str) -> str:
    """`...transformer_blocks.0.attn1.to_q` -> `...transformer_blocks.0`; any other path as it is."""
    parts = path.split(".")
    return ".".join(parts[: parts.index("transformer_blocks") + 2]) if "transformer_blocks" in parts else path


def kernel_size(layer: Layer) -> int:
    """Positions that one output sees: 1 for Linear and 1x1 convolutions, 9 for 3x3."""
    return layer.weight[0, 0].numel()


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out, in) of the layer's weight as a matrix, where `in` counts the positions of a convolution's window."""
    return len(layer.weight), layer.weight[0].numel()


# ---------------------------------------------------------------- one layer


class LoRAModule(nn.Module):
    """The low-rank addition to one Linear or Conv2d layer. `forward` gives the addition alone.

    Shapes: Linear in -> out has down (rank, in) and up (out, rank); Conv2d k x k has down (rank, in, k, k), with the layer's
    stride and padding, and up (out, rank, 1, 1). `down` starts uniform in +-1/sqrt(fan_in), `up` at zero: so the start is
    the base model. Alpha None or 0: the rank.
    """

    alpha: Tensor
    hook: Any

    def __init__(self, lora_name: str, layer: Layer, rank: int, alpha: float | None, multiplier: float = 1.0):
        super().__init__()
        self.lora_name, self.rank, self.multiplier, self.enabled = lora_name, rank, multiplier, True
        self.matrix_shape, self.hook = matrix_shape(layer), None
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

    def read_scale(self) -> None:
        """Set the scale from the alpha tensor, once: reading a tensor at every step would make the host wait for the GPU."""
        self.scale = float(self.alpha) / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """multiplier * scale * up(down(x)): (B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W')."""
        # Scaled between the two, where a position has the fewest values.
        return self.lora_up(self.lora_down(self.in_own_type(x)) * (self.scale * self.multiplier))

    def in_own_type(self, x: Tensor) -> Tensor:
        """x in the type of these weights, which may differ from the layer's; autocast sees to that itself."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_down.weight.dtype)

    def is_idle(self) -> bool:
        """Whether this call adds nothing: switched off, or strength 0 outside of training."""
        return not self.enabled or (self.multiplier == 0 and not self.training)

    def attach(self, layer: Layer) -> None:
        """Add this module's result to the layer's from now on. Several networks may be attached to one layer."""
        self.hook = layer.register_forward_hook(self._after_layer)

    def _after_layer(self, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.is_idle() else self.added_to(output, layer, inputs[0])

    def added_to(self, output: Tensor, layer: Layer, x: Tensor) -> Tensor:
        """output + forward(x), where `output` is what the layer gave for x; in the output's type."""
        return output + self(x).to(output.dtype)

    def detach(self) -> None:
        """Undo `attach`."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def file_weights(self) -> dict[str, Tensor]:
        """What a file holds of this module: alpha, lora_down.weight and lora_up.weight."""
        return {key: tensor.detach() for key, tensor in self.state_dict().items()}

    def from_file(self, weights: Weights) -> dict[str, Tensor]:
        """The weights of a file, by their names in it, that are this module's, in its shapes. ValueError if the rank differs."""
        up, down, alpha = module_weights(weights, self.lora_name, self.matrix_shape)
        if len(down) != self.rank:
            option = "--network_dim " if kernel_size(self.lora_down) == 1 else "--network_args conv_dim="
            raise ValueError(
                f"{self.lora_name} has rank {len(down)} in the weights and {self.rank} in this network; "
                f"use --dim_from_weights or {option}{len(down)}"
            )
        up, down = up.reshape_as(self.lora_up.weight), down.reshape_as(self.lora_down.weight)
        return {"alpha": torch.tensor(alpha), "lora_up.weight": up, "lora_down.weight": down}

    @classmethod
    def weight_change(cls, weights: Weights, name: str, layer: Layer, device: Device = None) -> Tensor:
        """What the module of this name adds to the weight of this layer, in float32 and the weight's shape."""
        return weight_delta(*module_weights(weights, name, matrix_shape(layer)), device=device).view(layer.weight.shape)


# ---------------------------------------------------------------- the network


class LoRANetwork(nn.Module):
    """LoRA modules for the layers of a model, as one module with one state."""

    def __init__(self, modules: Iterable[nn.Module], multiplier: float = 1.0):
        super().__init__()
        for module in modules:
            self.add_module(module.lora_name, module)  # type: ignore[arg-type]
        if not self.loras:
            raise ValueError("no layer for a LoRA was found in the text encoder and U-Net; are they of Stable Diffusion?")
        self.set_multiplier(multiplier)

    @classmethod
    def create(
        cls, args: Any, multiplier: float, dim: int | None, alpha: float | None, text_encoder: TextEncoders, unet: UNet
    ) -> Any:
        """A new network; args are what `parse_network_args` gave."""
        ranks = 4 if dim is None else dim, 1.0 if alpha is None else alpha
        ranks_3x3 = args.get("conv_dim"), args.get("conv_alpha", 1.0)
        modules = []
        for name, layer in find_layers(text_encoder, unet, conv3x3="conv_dim" in args).items():
            rank_and_alpha = ranks_3x3 if kernel_size(layer) > 1 else ranks
            modules.append(LoRAModule(name, layer, *rank_and_alpha))
        return cls(modules, multiplier)

    @classmethod
    def from_weights(cls, args: Any, multiplier: float, weights: Weights, text_encoder: TextEncoders, unet: UNet) -> Any:
        """A network with the modules, ranks and alphas of these weights, which are not yet loaded into it."""
        layers, modules = find_layers(text_encoder, unet, conv3x3=True), []
        for name in names_in(weights, layers):
            _, down, alpha = module_weights(weights, name, matrix_shape(layers[name]))
            modules.append(LoRAModule(name, layers[name], len(down), alpha))
        return cls(modules, multiplier)

    @property
    def loras(self) -> Sequence[LoRAModule]:
        return list(self.children())  # type: ignore[arg-type]

    # ---- on and off

    def apply_to(self, text_encoder: TextEncoders, unet: UNet, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach the modules to the model's layers. Parts not applied are dropped: neither trained nor saved."""
        for module in self.loras:
            if not (apply_unet if prefix_of(module.lora_name) == UNET_PREFIX else apply_text_encoder):
                delattr(self, module.lora_name)
        self.unapply()
        layers = self.layers_in(text_encoder, unet)
        for module in self.loras:
            if module.lora_name not in layers:
                missing = f"the model has no layer for the LoRA module {module.lora_name}"
                raise ValueError(f"{missing}; was the network made for another model?")
            module.attach(layers[module.lora_name])

    def layers_in(self, text_encoder: TextEncoders, unet: UNet) -> dict[str, Any]:
        """The model's layers that this network can have modules for, by LoRA name."""
        return find_layers(text_encoder, unet, conv3x3=True)

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
        self, text_encoder: TextEncoders, unet: UNet, weights_sd: Weights, dtype: DType = None, device: Device = None
    ) -> None:
        """Change the model's layers for good: W += multiplier * alpha / rank * up down, in float32.

        dtype: round the result to this first (the layers keep their own type); device: calculate there.
        """
        layers = find_layers(text_encoder, unet, conv3x3=True)
        for name in names_in(weights_sd, layers):
            merge_module(LoRAModule, weights_sd, name, layers[name], self.multiplier, dtype, device)

    # ---- files

    def save_weights(self, file: str | os.PathLike, dtype: DType, metadata: Mapping[str, str] | None) -> None:
        """Write the file, whole or not at all; see `save_tensors`. dtype None keeps the weights' own."""
        save_tensors(self.tensors(dtype), file, metadata)

    def tensors(self, dtype: DType) -> dict[str, Tensor]:
        """`file_weights` on the CPU in this dtype; None: in their own."""
        return {key: t.to("cpu", dtype or t.dtype).contiguous() for key, t in self.file_weights().items()}

    def file_weights(self) -> dict[str, Tensor]:
        """The tensors of the file, as any loader takes them."""
        return {f"{module.lora_name}.{key}": t for module in self.loras for key, t in module.file_weights().items()}

    @classmethod
    def read(cls, file: str | os.PathLike) -> dict[str, Tensor]:
        """The tensors of a .safetensors file, or of a pickled one (no code in it runs), by this network's names for them."""
        if Path(file).suffix.lower() == ".safetensors":
            return safetensors.torch.load(Path(file).read_bytes())  # `load_file` opens no path that is not UTF-8
        content = torch.load(file, map_location="cpu", weights_only=True)
        return content.get("state_dict", content)

    def load_weights(self, file: str | os.PathLike) -> Any:
        """Load a file; the alphas, and so the scales, are the file's. Returns the missing and the unexpected keys."""
        return self.load_state_dict(self.read(file), strict=False)

    def load_state_dict(self, state_dict: Weights, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; alpha may be missing (then it is the rank), and Linear and 1x1 convolution fit each other."""
        fitted = dict(state_dict)
        for module in self.loras:
            name = module.lora_name
            if f"{name}.lora_down.weight" in fitted and f"{name}.lora_up.weight" in fitted:
                fitted |= {f"{name}.{key}": tensor for key, tensor in module.from_file(fitted).items()}
        result = super().load_state_dict(fitted, strict=strict, assign=assign)
        for module in self.loras:
            module.read_scale()
        return result

    def own_weights(self, weights: Weights) -> dict[str, Tensor]:
        """Those of a file's weights that are of modules of this network, by its names."""
        modules = dict(self.named_children())
        return {key: tensor for key, tensor in weights.items() if key.partition(".")[0] in modules}


# ---------------------------------------------------------------- weights as tensors


def weight_delta(up: Tensor, down: Tensor, alpha: float, device: Device = None) -> Tensor:
    """alpha / rank * up down in float32: (out, in), or (out, in, k, k) for a convolution."""
    up, down = up.to(device, torch.float32), down.to(device, torch.float32)
    return (up.flatten(1) @ down.flatten(1)).mul_(alpha / down.shape[0]).view(up.shape[0], *down.shape[1:])


def merge_module(
    kind: type[LoRAModule], weights: Weights, name: str, layer: Layer, multiplier: float, dtype: DType, device: Device
) -> None:
    """Add what the module of this name, which is of this kind, adds at this strength to the weight of its layer."""
    weight = layer.weight
    change = kind.weight_change(weights, name, layer, device or weight.device)
    merged = weight.to(change) + multiplier * change
    weight.copy_(merged.to(dtype or weight.dtype))


def names_in(weights: Weights, layers: Iterable[str]) -> list[str]:
    """The layers that these weights have a LoRA for. Warns of tensors that have no layer; ValueError if none has one."""
    names = [name for name in layers if f"{name}.lora_down.weight" in weights and f"{name}.lora_up.weight" in weights]
    if not names:
        raise ValueError(f"the names of these tensors ({len(weights)}) are not those of a kohya LoRA for this model")
    unused = [key for key in weights if key.partition(".")[0] not in names]
    if strange := next((key for key in weights if key not in unused and key.partition(".")[2] not in PLAIN_TENSORS), None):
        raise ValueError(f"{strange} is no part of a plain LoRA, and this copy of lora.py knows no other; use the suite")
    if unused:
        logger.warning("this model has no layer for %d of %d tensors, such as %s", len(unused), len(weights), unused[0])
    return names


def module_weights(weights: Weights, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """(up, down, alpha) of one module, checked against the `matrix_shape` of its layer. No alpha, or 0: the rank."""
    up, down = weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]
    rank = len(down)
    # Sizes, not shapes: SD 2 has its projections as Linear (2-D) or as 1x1 convolution (4-D), and weights fit both.
    if (len(up), up[0].numel(), down[0].numel()) != (shape[0], rank, shape[1]):
        raise ValueError(
            f"{name}: the weights (down {tuple(down.shape)}, up {tuple(up.shape)}) do not fit this model's layer "
            f"({shape[1]} in, {shape[0]} out); are they for another Stable Diffusion version?"
        )
    alpha = weights.get(f"{name}.alpha")
    return up, down, float(alpha if alpha is not None else 0) or float(rank)


def save_tensors(tensors: Weights, file: str | os.PathLike, metadata: Mapping[str, str] | None) -> None:
    """Write tensors to .safetensors, with metadata; or a plain dictionary of them to .ckpt/.pt.

    The suite's writer of the latter writes nothing that the A1111 web UI refuses; a copy alone has torch's. The file has its
    name only when whole. Raises ValueError, naming the key, for a value that is not finite.
    """
    file = Path(file)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file} was not written: {key} holds NaN or infinity in {str(tensor.dtype).removeprefix('torch.')}")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{uuid.uuid4().hex[:8]}{file.suffix}")
    try:
        if file.suffix == ".safetensors":
            safetensors.torch.save_file(dict(tensors), temporary, metadata)  # type: ignore[arg-type]
        else:
            writer = suite("library.formats.tensor_output")
            (writer.save_pickled if writer else torch.save)(dict(tensors), temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- making a network


PLAIN_ARGS = {"conv_dim": int, "conv_alpha": float}


def parse_network_args(words: Mapping[str, Any], neuron_dropout: float | None = None) -> Any:
    """Read the words of `--network_args`; neuron_dropout is `--network_dropout`. ValueError for those that are not understood."""
    if lora_args := suite("networks.lora_args"):
        return lora_args.parse_network_args(words, neuron_dropout)
    given = {word: value for word, value in {**words, "dropout": neuron_dropout}.items() if value is not None}
    if other := next((word for word in given if word not in PLAIN_ARGS), None):
        raise ValueError(f"network_args {other} needs networks/lora_args.py of the suite; this copy of lora.py does without it")
    return {word: PLAIN_ARGS[word](value) for word, value in given.items()}


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: UNet,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> Any:
    """A new network of rank network_dim (default 4) and alpha network_alpha (default 1; 0 means the rank).

    network_args are the words of `--network_args`, as text; see networks/lora_args.py. ValueError for wrong ones.
    """
    args = parse_network_args(network_args, neuron_dropout)
    return _network_class().create(args, multiplier, network_dim, network_alpha, text_encoder, unet)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: UNet,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """A network with the modules, ranks and alphas of a file, or of weights_sd, and these weights, not yet loaded into it.

    Ranks and alphas in network_args are not used. for_inference is in the contract; it changes nothing.
    """
    args = parse_network_args(network_args, neuron_dropout)
    kind = _network_class()
    weights = kind.read(file) if weights_sd is None else weights_sd  # type: ignore[arg-type] # one of the two is given
    network = kind.from_weights(args, multiplier, weights, text_encoder, unet)
    return network, network.own_weights(weights)


def _network_class() -> type[LoRANetwork]:
    module = suite("networks.suite_network")
    return module.SuiteNetwork if module else LoRANetwork
