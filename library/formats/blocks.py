"""The blocks of a U-Net by LoRA name, for ranks, learning rates and strengths by block. Pure data and functions on names.

Stable Diffusion 1.x and 2.x have 25 blocks and LoRA names in Diffusers' form, `lora_unet_down_blocks_1_attentions_0_...`.
SDXL has 23 and LoRA names in the form of its checkpoints, `lora_unet_input_blocks_4_1_...`. So a name shows its family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

BASE = "BASE"  # the text encoders, in lists of strengths


@dataclass(frozen=True)
class BlockMap:
    """The blocks of one kind of U-Net: `before` slots, then `down`, `mid` and `up` blocks, then optionally more slots.

    names: of all slots, in the order of block ranks (`block_dims`). lists: the blocks of a list of strengths (`--lbw`) by its
    length; in these MID is all middle blocks.
    """

    title: str
    names: tuple[str, ...]
    before: int
    down: int
    mid: int
    up: int
    lists: Mapping[int, tuple[str, ...]]
    index_of: Callable[[str], int | None]

    def block_index(self, lora_name: str) -> int | None:
        """The slot of a LoRA name; None for a text encoder, and for names of another form."""
        index = self.index_of(lora_name)
        return index if index is not None and index < len(self.names) else None

    def is_mid(self, index: int) -> bool:
        return 0 <= index - self.before - self.down < self.mid

    @property
    def with_strengths(self) -> tuple[str, ...]:
        """All results of `block_of`, in order: the text encoders, and the blocks with the middle as one."""
        return (BASE, *dict.fromkeys("MID" if self.is_mid(index) else name for index, name in enumerate(self.names)))

    @property
    def down_names(self) -> tuple[str, ...]:
        return self.names[self.before : self.before + self.down]

    @property
    def mid_names(self) -> tuple[str, ...]:
        return self.names[self.before + self.down :][: self.mid]

    @property
    def up_names(self) -> tuple[str, ...]:
        return self.names[self.before + self.down + self.mid :][: self.up]


def _numbered(name: str, count: int, first: int = 0) -> tuple[str, ...]:
    return tuple(f"{name}{index:02}" for index in range(first, count))


def _diffusers_index(lora_name: str) -> int | None:
    if lora_name.startswith("lora_unet_mid_block_"):
        return 12
    match = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_", lora_name)
    if match is None:
        return None
    side, level, kind, number = match.groups()
    return (1 if side == "down" else 13) + 3 * int(level) + (2 if kind.endswith("samplers") else int(number))


def _sgm_index(lora_name: str) -> int | None:
    if re.match(r"lora_unet_(time_embed|label_emb)_", lora_name):
        return 0
    match = re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_", lora_name)
    if match is None:
        return 22 if lora_name.startswith("lora_unet_out_") else None
    first, count = {"input_blocks": (1, 9), "middle_block": (10, 3), "output_blocks": (13, 9)}[match[1]]
    return first + int(match[2]) if int(match[2]) < count else None


_WITH_ATTENTION = ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *_numbered("OUT", 12, 3))
_SDXL_LISTS = {  # of programs for SDXL; for other models they stand for the blocks of the same names
    20: (BASE, *_numbered("IN", 9), "MID", *_numbered("OUT", 9)),
    12: (BASE, "IN04", "IN05", "IN07", "IN08", "MID", *_numbered("OUT", 6)),
}
SD_BLOCKS = BlockMap(
    title="Stable Diffusion 1.x and 2.x",
    names=(*_numbered("IN", 12), "MID", *_numbered("OUT", 12)),
    before=0,
    down=12,
    mid=1,
    up=12,
    lists={
        26: (BASE, *_numbered("IN", 12), "MID", *_numbered("OUT", 12)),
        17: (BASE, *_WITH_ATTENTION),
        16: _WITH_ATTENTION,
        **_SDXL_LISTS,
    },
    index_of=_diffusers_index,
)
SDXL_BLOCKS = BlockMap(
    title="SDXL",
    names=("EMB", *_numbered("IN", 9), "MID0", "MID1", "MID2", *_numbered("OUT", 9), "OUT"),
    before=1,
    down=9,
    mid=3,
    up=9,
    lists=_SDXL_LISTS,
    index_of=_sgm_index,
)
BLOCK_MAPS = (SD_BLOCKS, SDXL_BLOCKS)


def block_map(lora_names: Iterable[str]) -> BlockMap:
    """The block map of these LoRA names; that of Stable Diffusion 1.x and 2.x if no name shows it."""
    for name in lora_names:
        for blocks in BLOCK_MAPS:
            if blocks.block_index(name) is not None:
                return blocks
    return SD_BLOCKS


def block_of(lora_name: str) -> str:
    """The block of a module in a list of strengths, such as `IN04` or `MID`; BASE for a text encoder's."""
    blocks = block_map([lora_name])
    index = blocks.block_index(lora_name)
    if index is None:
        return BASE
    return "MID" if blocks.is_mid(index) else blocks.names[index]
