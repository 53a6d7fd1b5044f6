"""Names of a checkpoint's layers: against the key lists and against what the suite loads."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from library.formats.compvis import join_compvis, split_compvis
from library.formats.families import SD1, SD2, SDXL, FileFamily, family_of_checkpoint
from library.formats.lora_targets import Target, bias_targets, lora_targets, weight_targets
from library.formats.names import OLD_CLIP_PREFIX
from library.models.family import Model
from library.models.modules import weights_of
from library.models.registry import FAMILIES
from library.testing import sd2_configs, sd15_configs, sdxl_configs, small_sdxl, small_stable_diffusion
from networks.lora import find_layers

DATA = Path(__file__).parents[2] / "data"
POOLED = "conditioner.embedders.1.model."


CONFIGS = {"SD 1.x": sd15_configs, "SD 2.x": sd2_configs, "SDXL": sdxl_configs}


def full_size(family: FileFamily, old_clip_names: bool = False) -> tuple[dict[str, tuple[int, ...]], dict]:
    """The shapes of a full-size checkpoint, from modules without memory, and the layers that can have a LoRA."""
    models = next(found for found in FAMILIES if found.layout == family.layout)
    modules = {part.name: part.build(CONFIGS[family.title]()[part.name]) for part in models.parts}
    prefixes = {"text_encoder": OLD_CLIP_PREFIX} if old_clip_names else None
    joined = join_compvis({name: weights_of(module) for name, module in modules.items()}, family.layout, prefixes=prefixes)
    views = Model(models, modules, [], "epsilon", "full size").for_networks()
    return {name: tuple(value.shape) for name, value in joined.items()}, find_layers(*views, conv3x3=True)


@pytest.fixture(scope="module", params=["v1", "v1 old names", "v2", "sdxl"])
def checkpoint(request):
    family = {"v1": SD1, "v2": SD2, "sdxl": SDXL}[request.param.split()[0]]
    return *full_size(family, "old" in request.param), family


def test_every_layer_is_found_once_and_has_its_size(checkpoint):
    shapes, layers, family = checkpoint
    targets = lora_targets(shapes)
    assert set(targets) == set(layers)
    for name, target in targets.items():
        rows = target.rows(shapes[target.key][0])
        assert (rows.stop - rows.start, *shapes[target.key][1:]) == tuple(layers[name].weight.shape), name
    assert family_of_checkpoint(shapes) is family


def test_the_names_are_those_of_the_key_list(checkpoint):
    shapes, _, family = checkpoint
    file = {"SD 1.x": "sd15", "SD 2.x": "sd2", "SDXL": "sdxl"}[family.title]
    with open(DATA / f"lora-keys-{file}.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if family is SDXL:
        listed = {row["name"]: row for row in rows if row["in_conv_dim"] == "yes"}
        assert {row["name"] for row in rows if row["in_default"] == "yes"} == set(lora_targets(shapes, with_convolutions=False))
        for name, target in lora_targets(shapes).items():
            row, out_size = listed[name], shapes[target.key][0] // (1 if target.third is None else 3)
            assert (out_size, shapes[target.key][1]) == (int(row["out"]), int(row["in"])), name
    else:
        listed = {row["key"].removesuffix(".alpha") for row in rows if row["key"].endswith(".alpha")}
    assert set(listed) == set(lora_targets(shapes))


def test_the_names_lead_to_the_same_weights_as_the_suite_loads():
    """Every tensor is filled with its target in the file; then the loaded model's layers must hold the same numbers."""
    for model in (small_stable_diffusion(), small_stable_diffusion(family="sd2"), small_sdxl()):
        parts = {name: weights_of(module) for name, module in model.parts.items()}
        tensors = join_compvis(parts, model.family.layout)
        assert split_compvis(tensors, model.family.layout)[0]["unet"].keys() == parts["unet"].keys()
        layers = find_layers(*model.for_networks(), conv3x3=True)
        targets = lora_targets({name: tuple(value.shape) for name, value in tensors.items()})
        assert set(targets) == set(layers)
        for name, target in targets.items():
            tensor = tensors[target.key]
            assert torch.equal(tensor[target.rows(len(tensor))], layers[name].weight), name


def test_rows_of_joined_query_key_value():
    assert Target("k", 2).rows(12) == slice(8, 12) and Target("k").rows(12) == slice(0, 12)


def test_the_projection_is_the_layer_s_weight_transposed_unless_it_is_named_as_one():
    tensor = torch.arange(6.0).view(2, 3)
    names = (
        "conditioner.embedders.0.transformer.text_model.x",
        *(f"{POOLED}{name}" for name in ("ln_final.weight", "text_projection")),
    )
    shapes = {name: (2, 3) for name in names}
    target = weight_targets(shapes)["lora_te2_text_projection"]
    assert target.key == names[2] and torch.equal(target.weight(tensor), tensor.T)
    shapes[f"{names[2]}.weight"] = shapes.pop(names[2])
    target = weight_targets(shapes)["lora_te2_text_projection"]
    assert target.key == f"{names[2]}.weight" and torch.equal(target.weight(tensor), tensor)


def test_a_file_of_something_else_has_no_places():
    assert lora_targets({"first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3)}) == {}
    assert family_of_checkpoint({"a.weight": (1,)}) is None


@pytest.mark.parametrize("held", [24, 23])
def test_files_of_sd2_hold_24_text_layers_or_the_23_that_are_used(held):
    prefix = "cond_stage_model.model.transformer.resblocks"
    shapes = {f"{prefix}.{layer}.mlp.c_fc.weight": (8, 4) for layer in range(held)}
    shapes["cond_stage_model.model.ln_final.weight"] = (4,)
    names = {f"lora_te_text_model_encoder_layers_{layer}_mlp_fc1" for layer in range(23)}
    assert set(lora_targets(shapes)) == names


def test_all_layers_have_targets_for_weights_and_biases(checkpoint):
    shapes, layers, family = checkpoint
    weights, biases = weight_targets(shapes), bias_targets(shapes)
    assert set(layers) < set(weights)
    outside = ("conv_in", "conv_out", "time_embedding_linear_2", "conv_norm_out")
    outside = ("input_blocks_0_0", "out_2", "time_embed_2", "out_0", "label_emb_0_0") if family is SDXL else outside
    for name in outside:
        assert f"lora_unet_{name}" in weights and f"lora_unet_{name}" in biases
    text = "lora_te2_text_model" if family is SDXL else "lora_te_text_model"
    projection = {name: target for name, target in weights.items() if name.endswith("text_projection")}
    key = "conditioner.embedders.1.model.text_projection"
    assert projection == ({"lora_te2_text_projection": Target(key, is_transposed=True)} if family is SDXL else {})
    width = shapes[weights[f"{text}_final_layer_norm"].key][0]
    target = biases[f"{text}_encoder_layers_0_self_attn_v_proj"]
    rows = target.rows(shapes[target.key][0])
    assert rows.stop - rows.start == width
