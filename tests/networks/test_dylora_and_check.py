"""extract_lora_from_dylora and check_lora_weights."""

from __future__ import annotations

import hashlib

import pytest
import torch
from tool_files import load, lora_tensors, metadata_of, save_lora, small_model

from library.errors import UserError
from networks import check_lora_weights, extract_lora_from_dylora


@pytest.fixture
def dylora(tmp_path):
    tensors = lora_tensors(small_model(), 10, 5.0, only="mid_block")
    tensors = {key: value.half() for key, value in tensors.items()}
    metadata = {
        "ss_network_module": "networks.dylora",
        "ss_network_dim": "10",
        "ss_training_comment": "x",
        "ss_network_args": '{"unit": "4"}',
    }
    save_lora(tmp_path / "d.safetensors", tensors, **metadata)
    return tmp_path, tensors


def split(folder, *words, model="d.safetensors"):
    extract_lora_from_dylora.main(["--model", str(folder / model), "--save_to", str(folder / "s.safetensors"), *words])
    return sorted(path.name for path in folder.glob("s-*"))


def test_split_agrees_with_slices(dylora):
    folder, tensors = dylora
    assert split(folder, "--unit", "4") == ["s-0004.safetensors", "s-0008.safetensors", "s-0010.safetensors"]
    for rank in (4, 8, 10):
        found = load(folder / f"s-{rank:04}.safetensors")
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            expected = (
                value[:rank] if "lora_down" in key else value[:, :rank] if "lora_up" in key else value * rank / 10
            )  # the scale stays
            assert torch.equal(found[key], expected), key


def test_trap_1_14_all_ranks_right_hashes_and_no_crash_without_metadata(dylora):
    folder, tensors = dylora
    assert len(split(folder)) == 3  # the unit of the metadata
    for rank in (4, 8, 10):
        path = folder / f"s-{rank:04}.safetensors"
        metadata, content = metadata_of(path), path.read_bytes()
        assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == str(rank)
        assert metadata["ss_training_comment"] == f"split from DyLoRA, rank 10 to {rank}; x"
        data = content[8 + int.from_bytes(content[:8], "little") :]
        assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    save_lora(folder / "plain.safetensors", tensors)
    assert len(split(folder, "--unit", "5", model="plain.safetensors")) == 4
    with pytest.raises(UserError, match="--unit is missing"):
        split(folder, model="plain.safetensors")
    with pytest.raises(UserError, match="--unit 0: must be at least 1"):
        split(folder, "--unit", "0")


def test_trap_1_13_modules_are_counted_and_each_is_shown_once(dylora, capsys):
    folder, tensors = dylora
    names = {key.split(".")[0] for key in tensors}
    check_lora_weights.main([str(folder / "d.safetensors")])
    out = capsys.readouterr().out
    assert f"number of LoRA modules: {len(names)}\n" in out
    assert all(sum(line.startswith(f"{name} ") for line in out.splitlines()) == 1 for name in names)
    check_lora_weights.main([str(folder / "d.safetensors"), "-s"])
    keys = capsys.readouterr().out.split("tensors: ")[1]
    assert all(keys.count(f"  {key} ") == 1 for key in tensors)


def test_the_table_says_what_is_in_it(tmp_path, capsys):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.tensor([[3.0, 4.0]]),
        f"{name}.lora_up.weight": torch.ones(4, 1),
        f"{name}.alpha": torch.tensor(0.5),
    }
    save_lora(tmp_path / "a.safetensors", tensors, ss_network_module="networks.lora", long="x" * 500)
    check_lora_weights.main([str(tmp_path / "a.safetensors")])
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith(name))
    assert row[1:] == ["linear", "2", "4", "1", "0.5", "3.5", "1", "5"]  # |delta| = 0.5 * 2 * 5
    assert "NaN or infinity: none" in out and "MID" in out and "(500 characters)" in out and "networks.lora" in out


def test_nan_is_shown(tmp_path, capsys):
    tensors = lora_tensors(small_model(), 2, only="mid_block_attentions_0_proj")
    key = next(key for key in tensors if "lora_up" in key)
    save_lora(tmp_path / "a.safetensors", tensors | {key: tensors[key] * float("nan")})
    check_lora_weights.main([str(tmp_path / "a.safetensors")])
    out = capsys.readouterr().out
    assert "NaN or infinity: in 1 module," in out and "nan  NaN or infinity" in out


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_hostile_files(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for tool in (lambda: check_lora_weights.main([str(path)]), lambda: split(tmp_path, "--unit", "1", model="a.safetensors")):
        with pytest.raises(UserError, match="a.safetensors"):
            tool()
