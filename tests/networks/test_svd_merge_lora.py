"""svd_merge_lora: the error is the smallest possible, for any ranks, ratios and block weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tool_files import assert_close, load, lora_tensors, metadata_of, products, save_lora, small_model, total

from library.errors import UserError
from library.formats.blocks import SD_BLOCKS, block_of
from library.tools.block_weights import PRESETS, read_block_weights
from networks.svd_merge_lora import main


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two LoRAs of other ranks, one with 3x3 convolutions and one without alphas; and their paths."""
    folder = tmp_path_factory.mktemp("svd")
    model = small_model()
    a, b = lora_tensors(model, 6, 2.0, 1, only="blocks_1"), lora_tensors(model, 3, None, 2, only="blocks_1", conv3x3=False)
    b |= lora_tensors(model, 2, 4.0, 3, only="lora_te")
    return folder, a, b, [save_lora(folder / "a.safetensors", a), save_lora(folder / "b.safetensors", b)]


def merge(parts, *words, ratios=("0.6", "-0.4"), name="out.safetensors"):
    folder, _, _, paths = parts
    main(["--save_to", str(folder / name), "--models", *paths, "--ratios", *ratios, *words])
    return load(folder / name)


def test_the_error_is_the_optimum(parts, capsys):
    _, a, b, _ = parts
    result = merge(parts, "--new_rank", "4", "--new_conv_rank", "2")
    expected, found = total(products(a, 0.6), products(b, -0.4)), products(result)
    lost = kept = 0.0
    for name, full in expected.items():
        down = result[f"{name}.lora_down.weight"]
        rank = 2 if down.dim() == 4 and down.shape[-1] == 3 else 4
        s = np.linalg.svd(full.numpy(), compute_uv=False)
        assert len(down) == min(rank, int((s > 1e-6 * s[0]).sum())), name
        assert float((found[name] - full).norm()) == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-3, abs=1e-5 * s[0]), (
            name
        )
        lost, kept = lost + (s[rank:] ** 2).sum(), kept + (s[:rank] ** 2).sum()
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip().startswith("all ")]
    assert float(printed[0].strip("%")) == pytest.approx(100 * (kept / (kept + lost)) ** 0.5, abs=0.01)


def test_a_rank_that_is_enough_gives_the_exact_sum(parts):
    _, a, b, _ = parts
    assert_close(products(merge(parts, "--new_rank", "9")), total(products(a, 0.6), products(b, -0.4)), 1e-4)


def test_trap_1_7_nothing_is_clamped_unless_asked_for(parts):
    _, a, b, _ = parts
    plain = merge(parts, "--new_rank", "9")
    assert_close(products(plain), total(products(a, 0.6), products(b, -0.4)), 1e-4)
    clamped = merge(parts, "--new_rank", "9", "--clamp_quantile", "0.9")
    name = next(key.removesuffix(".lora_down.weight") for key in plain if key.endswith("lora_down.weight"))
    values = torch.cat([plain[f"{name}.lora_{side}.weight"].flatten().abs() for side in ("up", "down")])
    assert torch.cat([clamped[f"{name}.lora_{side}.weight"].flatten().abs() for side in ("up", "down")]).max() < values.max()


def test_trap_1_8_alpha_is_of_floating_point(parts):
    result = merge(parts, "--new_rank", "2", "--save_precision", "bf16")
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert all(float(value) == 2 for key, value in result.items() if key.endswith("alpha"))


def test_trap_1_9_a_device_and_no_alpha(parts):
    _, a, b, _ = parts
    result = merge(parts, "--new_rank", "9", "--device", "cpu")
    assert_close(products(result), total(products(a, 0.6), products(b, -0.4)), 1e-4)


def test_metadata(parts):
    merge(parts, "--new_rank", "2", "--new_conv_rank", "1")
    metadata = metadata_of(parts[0] / "out.safetensors")
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "2.0"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "1.0"}
    assert "sshs_model_hash" in metadata and "0.6 x a.safetensors" in metadata["ss_training_comment"]


def test_block_weights(parts):
    _, a, b, _ = parts
    weights = ",".join(str(0.1 * place) for place in range(26))
    result = products(merge(parts, "--new_rank", "9", "--lbw", weights, "INALL"))
    by_block = [dict(zip(SD_BLOCKS.lists[26], [0.1 * place for place in range(26)], strict=True)), read_block_weights("INALL")]
    expected = total(
        *[
            {name: ratio * weights.get(block_of(name), 1.0) * value for name, value in products(part).items()}
            for part, ratio, weights in zip((a, b), (0.6, -0.4), by_block, strict=True)
        ]
    )
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * float(value.abs().max()))


def test_block_lists_name_their_blocks():
    assert all(len(names) == count == len(set(names)) for count, names in SD_BLOCKS.lists.items())
    assert read_block_weights("[0, 1, 1,1,1,1,1,1,1,1,1,1,1,1,1,1,0.5]") | {} == {
        **dict.fromkeys(SD_BLOCKS.lists[17], 1.0),
        "BASE": 0,
        "OUT11": 0.5,
    }
    assert PRESETS["MIDD"] == [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert PRESETS["INS"] == [1, 1, 1, 1] + [0] * 13 and PRESETS["OUTS"] == [1] + [0] * 11 + [1] * 5
    assert block_of("lora_te_text_model_encoder_layers_0_mlp_fc1") == "BASE"
    assert block_of("lora_unet_up_blocks_1_attentions_0_proj_in") == "OUT03"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lbw", "1,2", "ALL"], "2 numbers given; for Stable Diffusion 1.x and 2.x give 12, 16, 17, 20 or 26"),
        (["--lbw", "ALL"], "1 given for 2 models"),
        (["--lbw", "ALL", "some"], "give 12, 16, .* numbers with commas .*, or one of NONE"),
        (["--new_rank", "0"], "--new_rank 0: must be at least 1"),
        (["--clamp_quantile", "2"], "above 0 and at most 1"),
        (["--device", "quantum"], "not available here"),
        (["--new_rnk", "4"], "did you mean '--new_rank'"),
    ],
)
def test_wrong_input(parts, words, message):
    with pytest.raises(UserError, match=message):
        merge(parts, *words, name="wrong.safetensors")
    assert not (parts[0] / "wrong.safetensors").exists()
