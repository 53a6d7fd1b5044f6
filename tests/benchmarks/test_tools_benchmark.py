"""benchmarks/tools.py, with small models in place of the full-size ones: every command of SDXL's rows runs, and is measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tools
from library.formats.lora_file import read_lora
from library.models.modules import weights_of
from library.testing import small_sdxl


@pytest.fixture
def files(tmp_path):
    model = small_sdxl()
    joined = tools.join_compvis({name: weights_of(part) for name, part in model.parts.items()}, model.family.layout)
    return tools.Files(tmp_path, {name: tuple(value.shape) for name, value in joined.items()}, torch.float16)


def test_the_rows_of_sdxl_are_measured_and_leave_no_large_file(files):
    lines = tools.sdxl_rows(files, [])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == [tools.SDXL + name for name in tools.SDXL_ROWS]
    assert all(0 < float(row[1]) < 600 and 0.05 < float(row[2]) < 4 for row in cells)
    left = {path.name for path in files.folder.rglob("*.safetensors")}
    assert left == {"model.safetensors", "rank16.safetensors", "rank32.safetensors"}
    assert {module.low_rank().rank for module in read_lora(files.path("rank16")).modules.values()} == {16}


def test_stacks_are_measured_beside_the_svd_of_their_product(monkeypatch):
    monkeypatch.setattr(tools, "STACKS", [(40, 30, 4), (40, 30, 200)])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tools.stack_rows(["rank 200"])]
    assert [row[0] for row in cells] == ["decompose 40 x 30 of rank 200", "- beside float64"]
    assert all(0 <= float(row[column]) < 60 for row in cells for column in (1, 3, 5))
