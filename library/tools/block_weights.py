"""Strengths by block of the U-Net (`--lbw`): presets and lists of numbers (`library/formats/blocks.py` has their blocks).

SD 1.x and 2.x have lists of 26, of 17 (the blocks in which plain LoRAs have modules) and of 16 (these without BASE, the text
encoder); SDXL has lists of 20 and of 12. Blocks that a shorter list does not have keep 1. Lists of SDXL's lengths also work for
SD 1.x and 2.x, for the blocks of the same names; the other lists do not work for SDXL, which lacks some of their blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from library.errors import UserError, counted
from library.formats.blocks import SD_BLOCKS, SDXL_BLOCKS, BlockMap, block_map, block_of
from library.formats.lora_file import LoraFile, all_names

# The web UI's presets, over the 17 blocks: the text encoder and these positions of the list get 1, the others 0.
_PRESETS = {
    "ALL": range(1, 17),
    "INS": range(1, 4),
    "IND": range(4, 7),
    "INALL": range(1, 7),
    "MIDD": range(4, 12),
    "OUTD": range(8, 12),
    "OUTS": range(12, 17),
    "OUTALL": range(8, 17),
}
PRESETS = {
    "NONE": [0.0] * 17,
    **{name: [1.0, *(float(position in positions) for position in range(1, 17))] for name, positions in _PRESETS.items()},
    "ALL0.5": [0.5] * 17,
}
# The presets that have the same meaning for SDXL, over its 20 blocks. The others select ranges that SDXL does not have.
_SDXL_PRESETS = {
    "NONE": [0.0] * 20,
    "ALL": [1.0] * 20,
    "INALL": [1.0] * 10 + [0.0] * 10,
    "OUTALL": [1.0] + [0.0] * 10 + [1.0] * 9,
    "ALL0.5": [0.5] * 20,
}


@dataclass(frozen=True)
class Strength:
    """The strength of a LoRA in a merge: its ratio, times the strength of a module's block if one is given."""

    ratio: float
    by_block: Mapping[str, float] = field(default_factory=dict)

    def of(self, lora_name: str) -> float:
        """The strength of the module of this name."""
        return self.ratio * self.by_block.get(block_of(lora_name), 1.0)


def strengths(loras: Sequence[LoraFile], ratios: Sequence[float], texts: Sequence[str] | None) -> list[Strength]:
    """The strength of each LoRA, from `--ratios` and `--lbw`. Raises UserError if a text does not fit the blocks of the LoRAs."""
    if texts is None:
        return [Strength(ratio) for ratio in ratios]
    blocks = block_map(all_names(loras))
    return [Strength(ratio, read_block_weights(text, blocks)) for ratio, text in zip(ratios, texts, strict=True)]


def read_block_weights(text: str, blocks: BlockMap = SD_BLOCKS) -> dict[str, float]:
    """Strength by block name, from a preset, `1,0.5,...` or `[1, 0.5, ...]`. Blocks that the list does not have are left out."""
    presets = _SDXL_PRESETS if blocks is SDXL_BLOCKS else PRESETS
    if text.upper() in presets:
        numbers = presets[text.upper()]
        return dict(zip(blocks.lists[len(numbers)], numbers, strict=True))
    if text.upper() in PRESETS:
        cure = f"for {blocks.title} give {_choice(blocks, presets)}"
        raise UserError(f"--lbw {text} is made for the blocks of {SD_BLOCKS.title}; {cure}")
    try:
        numbers = [float(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise UserError(f"--lbw {text}: give {_choice(blocks, presets)}") from None
    if len(numbers) not in blocks.lists:
        raise UserError(f"--lbw: {counted(len(numbers), 'number')} given; for {blocks.title} give {_choice(blocks, presets)}")
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"--lbw {text}: every number must be finite")
    return dict(zip(blocks.lists[len(numbers)], numbers, strict=True))


def _choice(blocks: BlockMap, presets: Mapping[str, Sequence[float]]) -> str:
    counts = sorted(blocks.lists)
    usual = 12 if blocks is SDXL_BLOCKS else 17
    lists = f"{', '.join(map(str, counts[:-1]))} or {counts[-1]} numbers with commas ({usual}: {' '.join(blocks.lists[usual])})"
    return f"{lists}, or one of {', '.join(presets)}"
