"""benchmarks/checkpointing.py: its budgets lie between none and all, and a row has its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from benchmarks import train_step
from benchmarks.checkpointing import FAMILIES, SHARES, measure, words_of
from benchmarks.train_step import Case
from library.training.options import parse_options
from tests.library.training.small_runs import use_two_blocks

CASE = Case(64, 2, "no", "unet")


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_lie_on_the_way_from_none_to_all(family):
    case = Case(256, 4, "no", "unet")
    chosen = [parse_options(words_of(case, family, share, Path("folder"), 2)).training for share in SHARES.values()]
    assert [training.gradient_checkpointing for training in chosen] == [False, True, True, True]
    budgets = [training.gradient_checkpointing_budget for training in chosen]
    assert budgets[0] is budgets[3] is None and budgets[1] > budgets[2] > 4


def test_a_row_has_its_numbers(tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    monkeypatch.setattr(train_step, "IMAGES", 4)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")  # never read
    train_step.make_images(tmp_path / "64px", 64)
    found = measure(CASE, "sd1", 1.0, tmp_path, 1)
    assert found["parts"] > 5 and all(found[name] > 0 for name in ("wall", "processor", "peak"))
