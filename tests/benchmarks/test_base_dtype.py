"""benchmarks/base_dtype.py counts what packing really takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.base_dtype import PLAIN, bytes_of, estimate
from library.training.memory.packing import FORMATS, pack_weights


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_a_model_that_is_packed(name):
    def make() -> nn.Module:
        layers = nn.Sequential(
            nn.Linear(64, 48), nn.Linear(64, 48, bias=False), nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 1), nn.LayerNorm(4)
        )
        return layers.half().requires_grad_(False)

    plain, packed = make(), make()
    pack_weights(packed, name)
    held = sum(tensor.nbytes for tensor in (*packed.parameters(), *packed.buffers()))
    assert bytes_of(plain, name, torch.float16) == held < 0.75 * bytes_of(plain, PLAIN, torch.float16)


def test_estimates_fall_with_the_bits():
    assert estimate(PLAIN) > estimate("int8") == estimate("fp8") > estimate("nf4") > 1
