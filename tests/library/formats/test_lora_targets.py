"""Names of a checkpoint's layers: against the key lists and against what the suite loads."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.formats.compvis import SD1_LAYOUT, SD2_LAYOUT, join_compvis
from library.formats.lora_targets import Target, bias_targets, is_v2, lora_targets, weight_targets
from library.formats.names import OLD_CLIP_PREFIX
from library.models.clip import empty_text_encoder, inner_text_model
from library.models.unet import empty_unet
from library.models.vae import empty_vae
from library.testing import sd2_configs, sd15_configs
from networks.lora import find_layers

DATA = Path(__file__).parents[2] / "data"


def compvis_shapes(configs: dict, v2: bool, old_clip_names: bool = False) -> tuple[dict[str, tuple[int, ...]], dict]:
    """The shapes of a full-size checkpoint, from modules without memory, and the layers that can have a LoRA."""
    unet, vae, text = empty_unet(configs["unet"]), empty_vae(configs["vae"]), empty_text_encoder(configs["text_encoder"])
    parts = {"unet": unet.state_dict(), "vae": vae.state_dict()}
    parts["text_encoder"] = {k: v for k, v in inner_text_model(text).state_dict().items() if not k.endswith("position_ids")}
    joined = join_compvis(
        parts, SD2_LAYOUT if v2 else SD1_LAYOUT, prefixes={"text_encoder": OLD_CLIP_PREFIX} if old_clip_names else None
    )
    return {name: tuple(value.shape) for name, value in joined.items()}, find_layers(text, unet, conv3x3=True)


@pytest.fixture(scope="module", params=["v1", "v1 old names", "v2"])
def checkpoint(request):
    v2 = request.param == "v2"
    return *compvis_shapes(sd2_configs() if v2 else sd15_configs(), v2, "old" in request.param), v2


def test_every_layer_is_found_once_and_has_its_size(checkpoint):
    shapes, layers, v2 = checkpoint
    targets = lora_targets(shapes)
    assert set(targets) == set(layers)
    for name, target in targets.items():
        rows = target.rows(shapes[target.key][0])
        assert (rows.stop - rows.start, *shapes[target.key][1:]) == tuple(layers[name].weight.shape), name
    assert is_v2(shapes) is v2


def test_the_names_are_those_of_the_key_list(checkpoint):
    shapes, _, v2 = checkpoint
    with open(DATA / f"lora-keys-sd{2 if v2 else 15}.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["key"].endswith(".alpha")]
    assert {row["key"].removesuffix(".alpha") for row in rows} == set(lora_targets(shapes))


def test_the_names_lead_to_the_same_weights_as_the_suite_loads():
    """Every tensor is filled with its target in the file; then the loaded model's layers must hold the same numbers."""
    import torch

    from library.formats.compvis import split_compvis
    from library.testing import small_stable_diffusion

    for v2 in (False, True):
        model = small_stable_diffusion(v2=v2)
        parts = {
            "unet": model.denoiser.state_dict(),
            "vae": model.vae.state_dict(),
            "text_encoder": inner_text_model(model.text_encoders[0]).state_dict(),
        }
        parts["text_encoder"] = {k: v for k, v in parts["text_encoder"].items() if not k.endswith("position_ids")}
        layout = SD2_LAYOUT if v2 else SD1_LAYOUT
        tensors = join_compvis(parts, layout)
        assert split_compvis(tensors, layout)[0]["unet"].keys() == parts["unet"].keys()
        layers = find_layers(model.text_encoders[0], model.denoiser, conv3x3=True)
        targets = lora_targets({name: tuple(value.shape) for name, value in tensors.items()})
        assert set(targets) == set(layers)
        for name, target in targets.items():
            tensor = tensors[target.key]
            assert torch.equal(tensor[target.rows(len(tensor))], layers[name].weight), name


def test_rows_of_joined_query_key_value():
    assert Target("k", 2).rows(12) == slice(8, 12) and Target("k").rows(12) == slice(0, 12)


def test_a_file_of_something_else_has_no_places():
    assert lora_targets({"first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3)}) == {}
    assert is_v2({"a.weight": (1,)}) is None


@pytest.mark.parametrize("held", [24, 23])
def test_files_of_sd2_hold_24_text_layers_or_the_23_that_are_used(held):
    prefix = "cond_stage_model.model.transformer.resblocks"
    shapes = {f"{prefix}.{layer}.mlp.c_fc.weight": (8, 4) for layer in range(held)}
    shapes["cond_stage_model.model.ln_final.weight"] = (4,)
    names = {f"lora_te_text_model_encoder_layers_{layer}_mlp_fc1" for layer in range(23)}
    assert set(lora_targets(shapes)) == names


def test_all_layers_have_targets_for_weights_and_biases(checkpoint):
    shapes, layers, _ = checkpoint
    weights, biases = weight_targets(shapes), bias_targets(shapes)
    assert set(layers) < set(weights)
    for name in ("lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding_linear_2", "lora_unet_conv_norm_out"):
        assert name in weights and name in biases
    width = shapes[weights["lora_te_text_model_final_layer_norm"].key][0]
    target = biases["lora_te_text_model_encoder_layers_0_self_attn_v_proj"]
    rows = target.rows(shapes[target.key][0])
    assert rows.stop - rows.start == width
