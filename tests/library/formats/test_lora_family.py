"""Which family a LoRA file is for: by layers, metadata and widths."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.formats.families import FILE_FAMILIES, SD1, SD2, SDXL, family_of_checkpoint, titles
from library.formats.lora_family import families_of_lora
from library.formats.prediction import prediction_of_lora

DATA = Path(__file__).parents[2] / "data"
Q = "transformer_blocks_0_attn1_to_q.lora_down.weight"
K = "transformer_blocks_0_attn2_to_k.lora_down.weight"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"


@pytest.mark.parametrize(
    "key, width, families",
    [
        (f"lora_unet_down_blocks_0_attentions_0_{Q}", 8, (SD1, SD2)),
        (f"lora_unet_output_blocks_11_1_{Q}", 8, (SD1, SD2)),
        (f"lora_unet_input_blocks_1_1_{Q}", 8, (SD1, SD2)),
        (f"lora_unet_output_blocks_0_1_{Q}", 8, (SDXL,)),
        ("unet.up_blocks.0.attentions.0.proj_in.lora_A.weight", 8, (SDXL,)),
        ("unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight", 8, (SDXL,)),
        ("unet.add_embedding.linear_1.lora_A.weight", 8, (SDXL,)),
        (f"lora_te2_{TEXT}", 8, (SDXL,)),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight", 8, (SDXL,)),
        (f"lora_unet_middle_block_1_{K}", 2048, (SDXL,)),
        (f"lora_unet_mid_block_attentions_0_{K}", 768, (SD1,)),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", 1024, (SD2,)),
        (f"lora_te_{TEXT}", 768, (SD1,)),
        (f"lora_te_{TEXT}", 1024, (SD2,)),
        (f"lora_te1_{TEXT}", 768, FILE_FAMILIES),  # Diffusers' conversion for SD 1, or the first of SDXL
        (f"lora_unet_middle_block_1_{Q}", 8, FILE_FAMILIES),
    ],
)
def test_by_layers_and_widths(key, width, families):
    assert families_of_lora({key: (2, width)}) == families


@pytest.mark.parametrize(
    "metadata, families",
    [
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}, (SDXL,)),
        ({"ss_base_model_version": "SDXL_base_v0-9"}, (SDXL,)),
        ({"ss_base_model_version": "sd_v2_v"}, (SD2,)),
        ({"ss_v2": "True"}, (SD2,)),
        ({"ss_v2": "False"}, (SD1,)),  # as web UIs take it
        ({}, FILE_FAMILIES),
    ],
)
def test_by_metadata_where_layers_fit_several_families(metadata, families):
    assert families_of_lora({f"lora_unet_middle_block_1_{Q}": (2, 8)}, metadata) == families


def test_trap_48_wrong_metadata_do_not_make_sdxl_something_else():
    assert families_of_lora({f"lora_te2_{TEXT}": (2, 8)}, {"ss_v2": "False", "ss_base_model_version": "sd_v1"}) == (SDXL,)


@pytest.mark.parametrize("file, families", [("sd15", (SD1, SD2)), ("sd2", (SD1, SD2)), ("sdxl", (SDXL,))])
def test_the_names_of_every_list_determine_the_family(file, families):
    with open(DATA / f"lora-keys-{file}.csv", encoding="utf-8") as lines:
        names = [row.get("key", row.get("name")).split(".")[0] for row in csv.DictReader(lines)]
    assert families_of_lora({f"{name}.alpha": () for name in names}) == families


def test_trap_8_a_checkpoint_is_recognised_by_its_names_and_not_by_its_size():
    one, two = "conditioner.embedders.0.transformer.text_model.x", "conditioner.embedders.1.model.x"
    assert family_of_checkpoint([one, two]) is SDXL and family_of_checkpoint([one]) is None
    assert family_of_checkpoint(["cond_stage_model.model.x"]) is SD2
    assert family_of_checkpoint(["cond_stage_model.transformer.x"]) is SD1
    assert titles((SD1, SDXL)) == "SD 1.x or SDXL"


def test_what_the_model_of_a_lora_predicts():
    assert prediction_of_lora({"ss_base_model_version": "sd_v2_v"}) == "v"
    assert prediction_of_lora({"ss_base_model_version": "sd_v2", "modelspec.prediction_type": "v"}) == "epsilon"
    assert prediction_of_lora({"ss_base_model_version": "sdxl_base_v1-0"}) is None
    assert prediction_of_lora({"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "v"}) == "v"
    assert prediction_of_lora({}) is None
