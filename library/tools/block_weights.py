"""Strengths by block of the U-Net (`--lbw`): presets, and lists of 12, 16, 17, 20 or 26 numbers.

The 26 blocks are BASE (the text encoder), IN00 to IN11, MID and OUT00 to OUT11. Shorter lists name only some of them; the
others keep 1. 17 are those in which plain LoRAs have modules, 16 these without BASE. 20 and 12 are the lists of programs that
were made for larger models; here they mean the blocks of the same names.
"""

from __future__ import annotations

import math

from library.errors import UserError
from library.formats.blocks import SD_BLOCKS

LISTS = SD_BLOCKS.lists
# The web UI's presets, over the 17 blocks: the text encoder and these places in the list get 1, the others 0.
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
    **{name: [1.0, *(float(place in places) for place in range(1, 17))] for name, places in _PRESETS.items()},
    "ALL0.5": [0.5] * 17,
}


def read_block_weights(text: str) -> dict[str, float]:
    """Strength by block name, from a preset, `1,0.5,...` or `[1, 0.5, ...]`; of the blocks that the list names."""
    if text.upper() in PRESETS:
        return dict(zip(LISTS[17], PRESETS[text.upper()], strict=True))
    try:
        numbers = [float(word) for word in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise UserError(f"--lbw {text}: give numbers with commas, or one of {', '.join(PRESETS)}") from None
    if len(numbers) not in LISTS:
        raise UserError(f"--lbw: {len(numbers)} numbers given; 12, 16, 17, 20 or 26 are needed (17: {' '.join(LISTS[17])})")
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"--lbw {text}: every number must be finite")
    return dict(zip(LISTS[len(numbers)], numbers, strict=True))
