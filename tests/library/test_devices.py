from __future__ import annotations

import os

import pytest
import torch

from library.devices import check_precision, peak_memory_bytes, use_all_cores
from library.errors import UserError


def test_fp16_on_a_cpu_is_refused_with_the_cure():
    with pytest.raises(UserError, match="bf16 or no"):
        check_precision("fp16", torch.device("cpu"))
    check_precision("bf16", torch.device("cpu"))


def test_under_accelerate_every_core_is_used_and_else_the_user_s_number(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        torch.set_num_threads(1)
        assert use_all_cores() == 1
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert use_all_cores() == cores == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_peak_memory_grows_with_use():
    block = torch.ones(200_000_000, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) > block.numel()
