"""The LoRAs that a DyLoRA file holds, one for each rank."""

from __future__ import annotations

import json

from library.errors import UserError
from library.formats.lora_file import LoraFile
from library.formats.low_rank import LowRank, split


def modules_of(lora: LoraFile) -> dict[str, LowRank]:
    """The modules of the file. UserError, naming the first that is none, unless all are LoRAs."""
    modules = {name: module for name, adapter in lora.modules.items() if (module := adapter.low_rank())}
    if other := next((name for name in lora.modules if name not in modules), None):
        raise UserError(f"{lora.path} is no DyLoRA: {other} is a {lora.modules[other].title}; give a file of networks.dylora")
    return modules


def ranks_of(lora: LoraFile, unit: int) -> list[int]:
    """unit, 2 * unit, ... and the rank of the file itself."""
    largest = max(module.rank for module in modules_of(lora).values())
    return [*range(unit, largest, unit), largest]


def split_lora(lora: LoraFile, rank: int) -> dict[str, LowRank]:
    """The LoRA of the first `rank` ranks; modules that have fewer keep what they have."""
    return {name: split(module, rank) for name, module in modules_of(lora).items()}


def unit_of(lora: LoraFile, given: int | None) -> int:
    """The unit that is given, or that the file was trained with."""
    try:
        trained = json.loads(lora.metadata.get("ss_network_args", "{}")).get("unit")
        unit = given if given is not None else int(trained)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"--unit is missing, and {lora.path} does not say what it was trained with; give it, such as --unit 4"
        ) from None
    if unit < 1:
        raise UserError(f"--unit {unit}: must be at least 1")
    return unit
