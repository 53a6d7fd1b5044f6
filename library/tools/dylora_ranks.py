"""The LoRAs in a DyLoRA file, one for each rank."""

from __future__ import annotations

import json

from library.errors import UserError
from library.formats.lora_file import LoraFile
from library.formats.low_rank import LowRank, split


def modules_of(lora: LoraFile) -> dict[str, LowRank]:
    """The modules of the file. Raises UserError if one is not a LoRA."""
    modules = {name: module for name, adapter in lora.modules.items() if (module := adapter.low_rank())}
    if other := next((name for name in lora.modules if name not in modules), None):
        raise UserError(f"{lora.path} is no DyLoRA: {other} is a {lora.modules[other].title}; give a file of networks.dylora")
    return modules


def ranks_of(lora: LoraFile, unit: int) -> list[int]:
    """unit, 2 * unit, ..., and the rank of the file."""
    largest = max(module.rank for module in modules_of(lora).values())
    return [*range(unit, largest, unit), largest]


def split_lora(lora: LoraFile, rank: int) -> dict[str, LowRank]:
    """The LoRA of the first `rank` ranks; modules of a lower rank keep it."""
    return {name: split(module, rank) for name, module in modules_of(lora).items()}


def unit_of(lora: LoraFile, given: int | None) -> int:
    """The unit given, or the one that the file was trained with. Raises UserError if neither is known."""
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
