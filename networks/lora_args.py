"""The words of `--network_args` that networks.lora understands: read, checked, and what they mean for each layer.

A copy of networks/lora.py alone has the plain ones (`PLAIN_ARGS`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from library.errors import counted, nearest
from library.formats.blocks import BLOCK_MAPS, SD_BLOCKS, BlockMap, block_map
from library.formats.lora_layouts import resnets_of
from library.text_values import read_value
from networks.suite_module import SuiteModule
from networks.variants import VARIANTS, Variant, combined

Reader = Callable[[Any], Any]  # raises ValueError for a value that the word does not take

LR_PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


# ---------------------------------------------------------------- what each word takes, of a value as `read_value` makes it


def take_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"'{value}' is not a number")
    return float(value)


def take_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value >= 0 and value % 1 == 0):
        raise ValueError(f"'{value}' is not a whole number")
    return int(value)


def take_share(value: Any) -> float:
    share = take_number(value)
    if not 0 <= share < 1:
        raise ValueError("must be at least 0 and below 1")
    return share


def take_bool(value: Any) -> bool:
    if value not in (True, False):  # 1 and 0 too
        raise ValueError("give True or False")
    return bool(value)


def take_choice(choices: Iterable[str], value: Any) -> str:
    if value not in choices:
        raise ValueError(f"give one of {', '.join(choices)}")
    return value


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def take_blocks(take_item: Reader, value: Any) -> tuple:
    """A number for each block: 25, or 23 for SDXL."""
    items = _items(value)
    if all(len(items) != len(blocks.names) for blocks in BLOCK_MAPS):
        raise ValueError(f"{counted(len(items), 'number')} given, {_needed('names')}")
    return tuple(take_item(item) for item in items)


def _needed(slots: str) -> str:
    """How many numbers each family needs, with its blocks by name. slots: the attribute of `BlockMap` that names them."""
    named = ((blocks.title, getattr(blocks, slots)) for blocks in BLOCK_MAPS)
    return "; ".join(f"{len(names)} needed for {title}: {' '.join(names)}" for title, names in named)


def take_numbers(value: Any) -> tuple[float, ...]:
    return tuple(take_number(item) for item in _items(value))


def take_mid_lr_weight(value: Any) -> tuple[float, ...]:
    """One number for all blocks in the middle, or one for each."""
    numbers, counts = take_numbers(value), sorted({1, *(blocks.mid for blocks in BLOCK_MAPS)})
    if len(numbers) not in counts:
        raise ValueError(f"{counted(len(numbers), 'number')} given; give 1, or one for each middle block ({counts[-1]} in SDXL)")
    return numbers


@dataclass(frozen=True)
class LrPreset:
    """Weights of learning rates along the blocks of one side: a curve from the first block to the last, plus an offset."""

    curve: str
    offset: float

    def weights(self, count: int) -> tuple[float, ...]:
        return tuple(LR_PRESETS[self.curve](i / (count - 1)) + self.offset for i in range(count))


def take_lr_weights(slots: str, value: Any) -> tuple[float, ...] | LrPreset:
    """A number for each block of one side (12, or 9 for SDXL), or a preset such as `sine` or `sine+0.25`.

    slots: the attribute of `BlockMap` that names the blocks of that side.
    """
    if isinstance(value, (list, tuple)):
        numbers = take_numbers(value)
        if len(numbers) > max(len(getattr(blocks, slots)) for blocks in BLOCK_MAPS):
            raise ValueError(f"{counted(len(numbers), 'number')} given, {_needed(slots)}")
        return numbers
    preset, _, offset = str(value).partition("+")
    if preset.strip() not in LR_PRESETS:
        presets = ", ".join(LR_PRESETS)
        raise ValueError(f"give 12 numbers (9 for SDXL) with commas, or a preset ({presets}), which may be as sine+0.25")
    return LrPreset(preset.strip(), take_number(read_value(offset)) if offset else 0.0)


def readers() -> dict[str, Reader]:
    """What each word takes, by word; also those of the variants that are registered by now."""
    return {
        "conv_dim": take_int,
        "conv_alpha": take_number,
        **_variant_readers(),
        "dropout": take_share,
        "rank_dropout": take_share,
        "module_dropout": take_share,
        "block_dims": partial(take_blocks, take_int),
        "block_alphas": partial(take_blocks, take_number),
        "conv_block_dims": partial(take_blocks, take_int),
        "conv_block_alphas": partial(take_blocks, take_number),
        "down_lr_weight": partial(take_lr_weights, "down_names"),
        "mid_lr_weight": take_mid_lr_weight,
        "up_lr_weight": partial(take_lr_weights, "up_names"),
        "block_lr_zero_threshold": take_number,
        "loraplus_lr_ratio": take_number,
        "loraplus_unet_lr_ratio": take_number,
        "loraplus_text_encoder_lr_ratio": take_number,
    }


def _variant_readers() -> dict[str, Reader]:
    choices: dict[str, list[str]] = {}
    for kind in VARIANTS:
        choices.setdefault(kind.word, []).extend([kind.choice] if kind.choice else [])
    return {word: partial(take_choice, ("default", *values)) if values else take_bool for word, values in choices.items()}


# ---------------------------------------------------------------- what the values mean


@dataclass(frozen=True)
class NetworkArgs:
    """The values of `--network_args`. None: not given.

    variants: the kinds of modules that were asked for. blocks, resnets: those of the model's U-Net and of each of its levels,
    known once its layers are.
    """

    conv_dim: int | None = None
    conv_alpha: float | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: tuple[float, ...] | LrPreset | None = None
    mid_lr_weight: tuple[float, ...] | None = None
    up_lr_weight: tuple[float, ...] | LrPreset | None = None
    block_lr_zero_threshold: float | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    variants: tuple[type[Variant], ...] = ()
    blocks: BlockMap = SD_BLOCKS
    resnets: int | None = None

    @property
    def dropouts(self) -> dict[str, float]:
        return {kind: getattr(self, kind) or 0.0 for kind in ("dropout", "rank_dropout", "module_dropout")}

    @property
    def sets_ranks(self) -> bool:
        """Whether they set ranks or the start, which the weights of a file set too."""
        return bool(self.block_dims) or self.conv3x3 or any(not variant.own_tensors for variant in self.variants)

    @property
    def module_class(self) -> type[SuiteModule] | None:
        """The class of the modules, if it is not the network's usual one."""
        return combined(self.variants)

    @property
    def conv3x3(self) -> bool:
        return self.conv_dim is not None or self.conv_block_dims is not None

    def for_layers(self, lora_names: Collection[str]) -> NetworkArgs:
        """These words for a model with layers of these names. ValueError, naming the blocks, if there are not as many numbers."""
        args = replace(self, blocks=block_map(lora_names), resnets=resnets_of(lora_names))
        blocks = args.blocks
        for key in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
            given = getattr(args, key)
            if given and len(given) != len(blocks.names):
                raise ValueError(_wrong_count(key, given, blocks, blocks.names))
        sides = {"down_lr_weight": blocks.down_names, "mid_lr_weight": blocks.mid_names, "up_lr_weight": blocks.up_names}
        for key, names in sides.items():
            given = getattr(args, key)
            if isinstance(given, tuple) and len(given) > len(names):
                raise ValueError(_wrong_count(key, given, blocks, names))
        return args

    @cached_property
    def lr_weights(self) -> tuple[float, ...] | None:
        """Learning rate weights, one a block, or None. Those at or below the threshold are 0."""
        if (self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight) == (None, None, None):
            return None
        blocks, mid = self.blocks, self.mid_lr_weight or (1.0,)
        weights = [1.0] * len(blocks.names)
        start = blocks.before
        for given, count in (
            (self.down_lr_weight, blocks.down),
            (mid * blocks.mid if len(mid) == 1 else mid, blocks.mid),
            (self.up_lr_weight, blocks.up),
        ):
            numbers = given.weights(count) if isinstance(given, LrPreset) else given or ()
            weights[start : start + len(numbers)] = numbers
            start += count
        threshold = self.block_lr_zero_threshold or 0.0
        return tuple(0.0 if weight <= threshold else weight for weight in weights)

    def lr_block(self, lora_name: str) -> tuple[str, float]:
        """The optimizer group of a U-Net module, and the weight of its learning rate."""
        block = self.blocks.block_index(lora_name)
        if self.lr_weights is None or block is None:
            return "unet", 1.0
        return f"unet_block{block}", self.lr_weights[block]

    def rank_and_alpha(self, lora_name: str, is_3x3: bool, dim: int, alpha: float) -> tuple[int, float]:
        """What a layer gets, given network_dim and network_alpha. Rank 0: no module."""
        block = self.blocks.block_index(lora_name)
        if is_3x3:
            dim, alpha = self.conv_dim or 0, 1.0 if self.conv_alpha is None else self.conv_alpha
        ranks, alphas = (self.conv_block_dims, self.conv_block_alphas) if is_3x3 else (self.block_dims, self.block_alphas)
        if block is None:
            return dim, alpha
        dim = 0 if self.lr_weights and self.lr_weights[block] == 0 else ranks[block] if ranks else dim
        return dim, alphas[block] if alphas else alpha


def _wrong_count(key: str, given: tuple, blocks: BlockMap, names: tuple[str, ...]) -> str:
    return f"network_args {key}: {counted(len(given), 'number')} given, {len(names)} needed for {blocks.title}: {' '.join(names)}"


# ---------------------------------------------------------------- a whole --network_args


# A word that would do nothing without one of these is an error.
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
    known: Mapping[str, Reader] | None = None,
    kind: type[NetworkArgs] = NetworkArgs,
) -> NetworkArgs:
    """Read and check the words of `--network_args`; neuron_dropout is `--network_dropout`. ValueError names key and cure.

    known: how each known word is read (None: `readers`); kind: the class of the result. Numbers by block are checked for the
    model in `for_layers`.
    """
    known = readers() if known is None else known
    given: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in known:
            close = nearest(key, known)
            cure = f"did you mean '{close}'?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"unknown network_args key '{key}'; {cure}")
        if text is not None:
            try:
                given[key] = known[key](read_value(str(text)))
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
    chosen = tuple(variant for variant in VARIANTS if given.get(variant.word) == (variant.choice or True))
    combined(chosen)
    own = {key: value for key, value in given.items() if key not in _variant_readers()}
    return kind(**own, variants=chosen)
