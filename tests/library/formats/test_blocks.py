"""Which block a LoRA name belongs to, for Stable Diffusion 1.x and 2.x and for SDXL."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.formats.blocks import SD_BLOCKS, SDXL_BLOCKS, block_map, block_of

DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize("file, blocks", [("sd15", SD_BLOCKS), ("sd2", SD_BLOCKS), ("sdxl", SDXL_BLOCKS)])
def test_every_name_belongs_to_the_listed_block(file, blocks):
    with open(DATA / f"lora-keys-{file}.csv", encoding="utf-8", newline="") as lines:
        rows = [(row.get("key", row.get("name")).split(".")[0], row["block_index"]) for row in csv.DictReader(lines)]
    assert len(rows) > 700
    for name, listed in rows:
        expected = int(listed) if listed.isdigit() else None
        assert blocks.block_index(name) == expected, name
        assert block_map([name]) is (SD_BLOCKS if expected is None else blocks)


@pytest.mark.parametrize(
    "name, index",
    [
        ("lora_unet_input_blocks_1_0_in_layers_2", 2),
        ("lora_unet_input_blocks_8_1_proj_in", 9),
        ("lora_unet_input_blocks_10_1_proj_in", None),  # no block of SDXL, and not the middle
        ("lora_unet_middle_block_2_in_layers_2", 12),
        ("lora_unet_output_blocks_2_2_conv", 15),
        ("lora_unet_output_blocks_9_1_proj_in", None),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", None),
    ],
)
def test_sdxl_blocks(name, index):
    assert SDXL_BLOCKS.block_index(name) == index


def test_counts_and_lists():
    assert (len(SD_BLOCKS.names), len(SDXL_BLOCKS.names)) == (25, 23)
    assert (SD_BLOCKS.down, SD_BLOCKS.mid, SD_BLOCKS.up) == (12, 1, 12)
    assert (SDXL_BLOCKS.down, SDXL_BLOCKS.mid, SDXL_BLOCKS.up) == (9, 3, 9)
    assert SDXL_BLOCKS.down_names[0] == "IN00" and SDXL_BLOCKS.up_names == tuple(f"OUT{i:02}" for i in range(9))
    assert SDXL_BLOCKS.mid_names == ("MID0", "MID1", "MID2") and SD_BLOCKS.mid_names == ("MID",)
    for blocks in (SD_BLOCKS, SDXL_BLOCKS):
        assert all(len(names) == count and len(set(names)) == count for count, names in blocks.lists.items())
    assert [block_of(f"lora_unet_middle_block_{i}_in") for i in range(3)] == ["MID"] * 3
    assert block_of("lora_unet_input_blocks_4_1_proj_in") == "IN04" and block_of("lora_te2_text_model") == "BASE"
