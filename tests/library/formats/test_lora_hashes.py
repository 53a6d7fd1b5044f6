"""The hashes by which web UIs know a LoRA, counted tensor by tensor, are those of the whole file as safetensors writes it."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch

from library.formats.lora_file import write_lora
from library.formats.lora_hashes import with_hashes
from library.formats.low_rank import LowRank
from library.formats.tensor_file import open_tensors

TENSORS = {
    "b.lora_up.weight": torch.rand(700, 300), "a.alpha": torch.tensor(4.0), "a.lora_down.weight": torch.rand(900, 300).half(),
    "c.empty": torch.zeros(0, 3),
}  # fmt: skip


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_tag": 'Käfer\n"日本" \x07', "modelspec.title": "no part of the legacy hash"},
        {"ss_long": "x" * (1 << 20)},  # the header reaches into the bytes of the legacy hash
    ],
    ids=["none", "text", "long"],
)
def test_they_are_those_of_the_whole_file(metadata):
    found = with_hashes(TENSORS, metadata)
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(TENSORS, training)
    data_start = 8 + int.from_bytes(content[:8], "little")
    assert found == {
        **metadata,
        "sshs_model_hash": hashlib.sha256(content[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def test_a_written_file_has_its_own(tmp_path):
    modules = {
        name: LowRank(torch.rand(600, 9), torch.rand(9, 500), 2.5) for name in ("lora_unet_out_2", "lora_te1_text_model_a")
    }
    write_lora(tmp_path / "a.safetensors", modules, {"ss_x": "1"}, torch.float32)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert file.metadata == with_hashes(tensors, {"ss_x": "1"})
    assert tensors.keys() == {f"{name}.{part}" for name in modules for part in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert tensors["lora_unet_out_2.alpha"] == 2.5 and torch.equal(
        tensors["lora_unet_out_2.lora_up.weight"], modules["lora_unet_out_2"].up
    )
