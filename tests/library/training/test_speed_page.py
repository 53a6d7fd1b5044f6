"""docs/speed.md: its estimates are those that a run prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.testing import full_size_header
from library.training.checks.estimates import estimated_bytes
from library.training.options import parse_options

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "speed.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) GB \| (\d+), (\d+) \| (yes|no) \| ([\d.]+) GiB \|$", PAGE, re.MULTILINE)
SDXL_ROWS = re.findall(r"^\| (\d+) GB \| (\d+), (\d+) \| (yes|no) \| (`int8`|none) \| ([\d.]+) GiB \|$", PAGE, re.MULTILINE)
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
WORDS = [*NEEDED, "--network_train_unet_only", "--network_dim=4", "--mixed_precision=fp16"]
SDXL_WORDS = [*NEEDED, "--network_train_unet_only", "--mixed_precision=bf16", "--cache_latents"]


@pytest.mark.parametrize("card, size, batch, checkpointing, estimate", ROWS)
def test_estimate_is_the_programs_and_fits_the_card(card, size, batch, checkpointing, estimate):
    options = parse_options([*WORDS, *["--gradient_checkpointing"] * (checkpointing == "yes")])
    needed = estimated_bytes(options, full_size_header(), int(batch), (int(size), int(size)))
    assert f"{needed / 2**30:.1f}" == estimate
    assert needed < 0.9 * int(card) * 10**9


@pytest.mark.parametrize("card, rank, batch, checkpointing, packed, estimate", SDXL_ROWS)
def test_estimate_of_sdxl_is_the_programs_and_fits_the_card(card, rank, batch, checkpointing, packed, estimate):
    words = [*SDXL_WORDS, f"--network_dim={rank}", *["--gradient_checkpointing"] * (checkpointing == "yes")]
    options = parse_options([*words, *[f"--base_dtype={packed.strip('`')}"] * (packed != "none")])
    needed = estimated_bytes(options, full_size_header("sdxl"), int(batch), (1024, 1024))
    assert f"{needed / 2**30:.1f}" == estimate
    assert needed < 0.9 * int(card) * 10**9


def test_every_size_of_card_is_there():
    assert [row[0] for row in ROWS] == ["4", "8", "8", "12", "24", "24"]
    assert [row[0] for row in SDXL_ROWS] == ["8", "8", "12", "12", "16", "16", "24", "24"]
