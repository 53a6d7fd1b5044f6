"""What training does with a LoRA network: optimizer groups by part of the model, by block and for LoRA+, and a largest norm."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.errors import counted
from networks.lora import TEXT_ENCODER_PREFIX, UNET_PREFIX
from networks.lora_args import NetworkArgs
from networks.suite_module import SuiteModule

logger = logging.getLogger(__name__)

Parts = Mapping[str, Sequence[SuiteModule]]
Rates = float | Sequence[float | None] | None
UNET = "unet"


def optimizer_groups(
    parts: Parts, args: NetworkArgs, text_encoder_lr: Rates, unet_lr: float | None, default_lr: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Optimizer groups and their names for the log. A rate of None means the default; parts of rate 0 are left out.

    parts: the modules that learn, by the prefix of their names. text_encoder_lr: one rate for all text encoders, or a list of one
    for each. With block weights the U-Net has one group a block, its rate times the weight. With LoRA+ (Hayou et al. 2024, arXiv
    2402.12354) each group is two: down with its rate, up with the ratio times as much.
    """
    groups, names = [], []
    ratios = {UNET: args.loraplus_unet_lr_ratio}
    for part, lr, modules in _with_rates(parts, text_encoder_lr, unet_lr):
        ratio = ratios.get(part, args.loraplus_text_encoder_lr_ratio) or args.loraplus_lr_ratio
        for name, (weight, members) in _blocks(args, part, modules).items():
            rate = (default_lr if lr is None else lr) * weight
            if not rate:
                logger.warning("%s: learning rate 0, not trained", name)
            elif ratio:
                others = [p for m in members for p in m.parameters() if p is not m.lora_up.weight]
                ups = [module.lora_up.weight for module in members]
                groups += [{"params": others, "lr": rate}, {"params": ups, "lr": rate * ratio}]
                names += [name, f"{name} plus"]
            else:
                groups.append({"params": [p for module in members for p in module.parameters()], "lr": rate})
                names.append(name)
    if not groups:
        raise ValueError("nothing to train: every learning rate is 0; give --learning_rate, --unet_lr or --text_encoder_lr")
    return groups, names


def _with_rates(parts: Parts, text_encoder_lr: Rates, unet_lr: float | None) -> list[tuple[str, float | None, list[SuiteModule]]]:
    """(name, rate, modules) of the text encoders, together or one by one, and of the U-Net."""
    text_encoders = {prefix: list(modules) for prefix, modules in parts.items() if prefix != UNET_PREFIX}
    unet = (UNET, unet_lr, list(parts.get(UNET_PREFIX, [])))
    rates = list(text_encoder_lr) if isinstance(text_encoder_lr, Sequence) else [text_encoder_lr]
    if len(rates) == 1:
        return [("textencoder", rates[0], list(itertools.chain(*text_encoders.values()))), unet]
    result = []
    for prefix, modules in text_encoders.items():
        number = prefix.removeprefix(TEXT_ENCODER_PREFIX)
        if not number or int(number) > len(rates):
            raise ValueError(f"--text_encoder_lr has {counted(len(rates), 'rate')}; give one, or one for each text encoder")
        result.append((f"textencoder{number}", rates[int(number) - 1], modules))
    return [*result, unet]


def _blocks(args: NetworkArgs, part: str, modules: Sequence[SuiteModule]) -> dict[str, tuple[float, list[SuiteModule]]]:
    """The modules by the name of their group, with the weight of its rate."""
    blocks: dict[str, tuple[float, list[SuiteModule]]] = {}
    for module in modules:
        name, weight = args.lr_block(module.lora_name) if part == UNET else (part, 1.0)
        blocks.setdefault(name, (weight, []))[1].append(module)
    return blocks


@torch.no_grad()
def limit_norms(modules: Sequence[SuiteModule], max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink every module whose ||scale * up down|| (Frobenius) exceeds max_norm to that norm.

    Returns how many were shrunk, and the mean and the largest norm afterwards, as tensors: reading them is left to the caller,
    since it waits for the GPU.
    """
    ratios, norms = [], []
    for module in modules:
        norm = module.product_norm()
        above_zero = norm.clamp(min=max_norm / 2)
        ratio = above_zero.clamp(max=max_norm) / above_zero
        module.lora_up.weight.mul_(ratio.sqrt())
        module.lora_down.weight.mul_(ratio.sqrt())
        ratios.append(ratio)
        norms.append(norm * ratio)
    stacked = torch.stack(norms)
    return (torch.stack(ratios) != 1).sum(), stacked.mean(), stacked.max()
