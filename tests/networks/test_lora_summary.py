"""What is said about a network before it trains."""

from __future__ import annotations

import torch

from networks.lora import create_network


def summary(model, dtype=None, **network_args):
    network = create_network(1.0, 4, 1, None, model.text_encoder, model.unet, **network_args)
    return network, network.summary(dtype).splitlines()


def test_modules_ranks_numbers_and_size(model, tmp_path):
    network, lines = summary(model, torch.float16, conv_dim="64")
    numbers = sum(p.numel() for p in network.parameters())
    network.save_weights(tmp_path / "a.safetensors", torch.float16, None)
    size = (tmp_path / "a.safetensors").stat().st_size / 2**20
    said = float(lines[0].split("about ")[1].split()[0])
    assert f"{len(network.loras)} LoRA modules, {numbers:,} trainable parameters" in lines[0]
    assert abs(said - size) < 0.06 + 0.02 * size  # the header is left out
    assert lines[1] == "  text encoder: 12 modules, rank 4, alpha 1"
    assert lines[2] == f"  U-Net: {len(network.parts['lora_unet'])} modules, rank 4, alpha 1; 3x3: rank 64, alpha 1"
    assert lines[3].startswith("  modules by block: IN01 15, IN03 1, IN04 15") and len(lines) == 4


def test_a_chart_where_ranks_or_rates_differ(model):
    dims = ["4"] * 25
    dims[12] = "16"
    _, lines = summary(model, block_dims=",".join(dims))
    assert next(line for line in lines if " MID " in line).endswith("rank 16, alpha 1  ########")
    assert next(line for line in lines if " IN01 " in line).endswith("rank 4, alpha 1   ##")
    _, lines = summary(model, mid_lr_weight="1.5", down_lr_weight="zeros+.2")
    assert next(line for line in lines if " MID " in line).endswith("rate x 1.5   ===============")
    assert next(line for line in lines if " IN01 " in line).endswith("rate x 0.2   ==")
    assert next(line for line in lines if " OUT03 " in line).endswith("rate x 1     ==========")


def test_one_part_alone_and_pissa(model):
    network = create_network(1.0, 4, 1, None, None, model.unet)
    assert "text encoder" not in network.summary()
    plain, pissa = (summary(model, **words)[1][0] for words in ({}, {"init": "pissa"}))
    assert pissa.split(";")[0] == plain.split(";")[0]  # as many numbers are trained
