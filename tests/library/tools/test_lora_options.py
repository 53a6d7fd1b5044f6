"""Checks of options that several LoRA tools have."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.tools.lora_options import output_path


def test_output_names(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1)}, source)
    with pytest.raises(UserError, match="overwrite an input"):
        output_path(tmp_path / "." / "a.safetensors", [source])
    with pytest.raises(UserError, match="overwrite an input"):
        output_path(tmp_path / "to be made" / ".." / "a.safetensors", [source])
    with pytest.raises(UserError, match="suffix decides"):
        output_path(tmp_path / "a.zip", [])
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        output_path(tmp_path / "d.safetensors", [])
    assert output_path(str(tmp_path / "b.pt"), [source]) == tmp_path / "b.pt"
