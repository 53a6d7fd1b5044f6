"""library/tools/spooled.py: modules that wait on the disk are those that were put there, in the dtype of the file."""

from __future__ import annotations

import pytest
import torch

from library.formats.low_rank import LowRank
from library.tools.spooled import SpooledModules


def module(seed: int, rank: int = 3, kernel: tuple[int, ...] = ()) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(8, rank, *(1 for _ in kernel), generator=generator)
    return LowRank(up, torch.randn(rank, 5, *kernel, generator=generator), alpha=rank / 3)


@pytest.mark.parametrize("in_memory", [0, 200, 1000])  # none of them, two, all
def test_modules_come_back_in_order_and_in_the_dtype_of_the_file(tmp_path, in_memory):
    modules = {"b": module(0), "a": module(1, kernel=(3, 3)), "c": module(2, rank=1)}
    with SpooledModules(tmp_path, torch.float16, in_memory) as spooled:
        spooled.update(modules)
        assert list(spooled) == ["b", "a", "c"] and len(spooled) == 3
        for name in ("c", "a", "b", "a"):
            found, expected = spooled[name], modules[name].to(torch.float16)
            assert torch.equal(found.up, expected.up) and torch.equal(found.down, expected.down)
            assert found.alpha == expected.alpha
        spooled["b"] = module(7)
        assert torch.equal(spooled["b"].up, module(7).up.half()) and torch.equal(spooled["a"].up, modules["a"].up.half())
        del spooled["b"]
        assert list(spooled) == ["a", "c"]
    assert not list(tmp_path.iterdir())


def test_beyond_the_limit_nothing_stays_in_memory(tmp_path):
    with SpooledModules(tmp_path, torch.float32, 0) as spooled:
        spooled["a"] = module(0)
        assert spooled["a"].up.data_ptr() != spooled["a"].up.data_ptr()


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    with SpooledModules(tmp_path / "new" / "folder", torch.float32) as spooled:
        spooled["a"] = module(0)
        assert spooled["a"].rank == 3
