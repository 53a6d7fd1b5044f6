"""Every row of the ecosystem's key lists: names, shapes and order, at full size, on the meta device."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest
import torch

from networks.lora import create_network

DATA = Path(__file__).parents[1] / "data"
# (key list, columns' suffix, linear projections)
VARIANTS = [("sd15", "", False), ("sd2", "_conv_projection", False), ("sd2", "_linear_projection", True)]


@cache
def full_size_model(version: str, linear_projection: bool):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers, heads = (1024, 23, (5, 10, 20, 20)) if version == "sd2" else (768, 12, 8)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=width, attention_head_dim=heads, use_linear_projection=linear_projection, sample_size=64
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
            )
        )
    return text_encoder, unet


def rows(version: str) -> list[dict[str, str]]:
    with open(DATA / f"lora-keys-{version}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("version, suffix, linear", VARIANTS)
@pytest.mark.parametrize("column, network_args", [("in_default_rank4", {}), ("in_conv_dim4", {"conv_dim": "4"})])
def test_every_key_has_the_listed_name_shape_and_place(version, suffix, linear, column, network_args):
    expected = [
        (row["key"], "" if row[f"shape_at_rank4{suffix}"] == "scalar" else row[f"shape_at_rank4{suffix}"])
        for row in rows(version)
        if row[column] == "yes"
    ]
    network = create_network(1.0, 4, 1, None, *full_size_model(version, linear), **network_args)
    state = network.state_dict()
    assert [(key, "x".join(map(str, tensor.shape))) for key, tensor in state.items()] == expected
    counts = {("sd15", "in_default_rank4"): 2_359_296, ("sd15", "in_conv_dim4"): 4_866_816}
    counts |= {("sd2", "in_default_rank4"): 3_424_256, ("sd2", "in_conv_dim4"): 5_931_776}
    assert sum(p.numel() for p in network.parameters()) == counts[version, column]


def test_the_reference_lists_are_complete():
    assert (len(rows("sd15")), len(rows("sd2"))) == (1050, 1248)


def test_names_do_not_depend_on_the_version_of_transformers():
    """Before 5.6, CLIPTextModel had an inner `text_model`; names are the same with and without it."""
    text_encoder, _ = full_size_model("sd15", False)
    older = torch.nn.Module()
    older.text_model = text_encoder
    new = create_network(1.0, 4, 1, None, text_encoder, None).state_dict()
    assert list(create_network(1.0, 4, 1, None, older, None).state_dict()) == list(new)
    assert next(iter(new)) == "lora_te_text_model_encoder_layers_0_self_attn_k_proj.alpha"
