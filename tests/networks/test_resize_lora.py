"""resize_lora: the best of the new rank, at the same strength."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tool_files import load, lora_tensors, metadata_of, products, save_lora, small_model

from library.errors import UserError
from networks.resize_lora import main


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resize")
    tensors = lora_tensors(small_model(), 8, 2.0, 1, only="mid_block")
    metadata = {
        "ss_network_dim": "8",
        "ss_network_alpha": "2.0",
        "ss_training_comment": "mine",
        "ss_seed": "7",
        "sshs_model_hash": "old",
    }
    return folder, tensors, save_lora(folder / "a.safetensors", tensors, **metadata)


def resize(lora, *words, name="out.safetensors"):
    folder, _, path = lora
    main(["--model", path, "--save_to", str(folder / name), *words])
    return load(folder / name)


def singular_values(tensors):
    return {name: np.linalg.svd(value.numpy(), compute_uv=False) for name, value in products(tensors).items()}


def test_truncation_is_the_optimum_and_keeps_the_scale(lora):
    result = resize(lora, "--new_rank", "3", "--new_conv_rank", "5")
    full, found, values = products(lora[1]), products(result), singular_values(lora[1])
    for name, s in values.items():
        down = result[f"{name}.lora_down.weight"]
        rank = 5 if down.dim() == 4 and down.shape[-1] == 3 else 3
        assert len(down) == rank and float(result[f"{name}.alpha"]) == pytest.approx(2.0 / 8 * rank)
        assert float((full[name] - found[name]).norm()) == pytest.approx(np.sqrt((s[rank:8] ** 2).sum()), rel=1e-3)


def suffices(method, s, rank, target):
    """Whether the first `rank` of the singular values `s` are enough."""
    if method == "sv_fro":
        return np.sqrt((s[:rank] ** 2).sum() / (s**2).sum()) >= target
    if method == "sv_cumulative":
        return s[:rank].sum() / s.sum() >= target
    return rank == len(s) or s[rank] < s[0] / target


@pytest.mark.parametrize("method, target", [("sv_fro", 0.8), ("sv_cumulative", 0.6), ("sv_ratio", 2.0)])
def test_trap_1_12_dynamic_methods_give_the_smallest_rank_that_does(lora, method, target):
    result = resize(lora, "--new_rank", "7", "--dynamic_method", method, "--dynamic_param", str(target))
    for name, s in singular_values(lora[1]).items():
        expected = next(rank for rank in range(1, 9) if suffices(method, s[:8], rank, target))
        assert len(result[f"{name}.lora_down.weight"]) == min(7, expected), name
    assert metadata_of(lora[0] / "out.safetensors")["ss_network_dim"] == "Dynamic"


def test_metadata_is_carried_and_updated(lora):
    resize(lora, "--new_rank", "2")
    metadata = metadata_of(lora[0] / "out.safetensors")
    assert metadata["ss_training_comment"] == "dimension is resized from 8 to 2; mine" and metadata["ss_seed"] == "7"
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "0.5" and metadata["sshs_model_hash"] != "old"


def test_no_rank_grows(lora, capsys):
    result = resize(lora, "--new_rank", "20")
    assert all(len(value) == 8 for key, value in result.items() if key.endswith("lora_down.weight"))
    assert "that had a lower one already" in capsys.readouterr().out


def test_verbose_and_half_precision_without_alpha(tmp_path, capsys):
    tensors = lora_tensors(small_model(), 4, None, only="mid_block_attentions_0_proj")
    torch.save({key: value.half() for key, value in tensors.items()}, tmp_path / "a.pt")
    main(
        [
            "--model",
            str(tmp_path / "a.pt"),
            "--save_to",
            str(tmp_path / "b.pt"),
            "--new_rank",
            "2",
            "--save_precision",
            "fp16",
            "--verbose",
        ]
    )
    result = torch.load(tmp_path / "b.pt", weights_only=True)
    assert {value.dtype for value in result.values()} == {torch.float16}
    assert all(float(value) == 2 for key, value in result.items() if key.endswith("alpha"))  # scale 1, as without alpha
    assert "lora_unet_mid_block_attentions_0_proj_in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dynamic_method", "sv_fro"], "--dynamic_param is missing"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "2"], "at most 1 for sv_fro"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "at least 1 for sv_ratio"),
        (["--new_rank", "-1"], "at least 1"),
        (["--new_rank", "x"], "invalid int value"),
    ],
)
def test_wrong_input(lora, words, message):
    with pytest.raises(UserError, match=message):
        resize(lora, *words, name="wrong.safetensors")
