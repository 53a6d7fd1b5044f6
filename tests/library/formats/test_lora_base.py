"""What a LoRA's metadata say of the model that it was trained on, beside the one that it is used with."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from library.files import legacy_hash_of_file
from library.formats.families import SD1, SD2, SDXL
from library.formats.lora_base import lora_metadata, trained_on_another_file, unlike_base

OLD = {"ss_base_model_version": "sdxl_base_v0-9", "ss_sd_model_name": "sd_xl_base_0.9.safetensors"}
OF_V = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "v"}


def test_trap_53_a_lora_of_sdxl_0_9_is_named_with_its_base():
    (reason,) = unlike_base(OLD, SDXL.records, "epsilon")
    assert reason.startswith("was trained on sd_xl_base_0.9.safetensors of SDXL 0.9, whose weights are others")
    assert not list(unlike_base({**OLD, "ss_base_model_version": "sdxl_base_v1-0"}, SDXL.records, "epsilon"))


@pytest.mark.parametrize(
    "metadata, family, prediction, clause",
    [
        (OF_V, SDXL, "epsilon", "predicts velocity, and this model predicts noise"),
        (OF_V | {"modelspec.prediction_type": "epsilon"}, SDXL, "v", "predicts noise, and this model predicts velocity"),
        ({"ss_base_model_version": "sd_v2_v"}, SD2, "epsilon", "predicts velocity, and this model predicts noise"),
    ],
)
def test_trap_53_a_lora_for_another_prediction_is_reported(metadata, family, prediction, clause):
    (reason,) = unlike_base(metadata, family.records, prediction)
    assert reason.startswith("was trained on a model that ") and clause in reason


@pytest.mark.parametrize(
    "metadata, family, prediction",
    [
        ({}, SDXL, "v"),
        (OF_V, SDXL, "v"),
        (OF_V, SDXL, None),
        ({"ss_base_model_version": "sd_v1"}, SD1, "epsilon"),
        ({"ss_base_model_version": "sdxl_1.0"}, SDXL, "v"),  # another program's, which says nothing of the prediction
    ],
)
def test_nothing_is_reported_where_no_file_states_it(metadata, family, prediction):
    assert not list(unlike_base(metadata, family.records, prediction))


def test_trap_53_the_file_that_a_lora_was_trained_on_is_recognised_by_its_hash(tmp_path):
    model, lora = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    save_file({"a": torch.rand(600, 600)}, model)
    facts = {"ss_sd_model_name": "other.safetensors", "ss_sd_model_hash": "12345678"}
    save_file({"a": torch.zeros(1)}, lora, facts)
    assert trained_on_another_file(lora_metadata(lora), model) == "other.safetensors"
    assert trained_on_another_file(facts | {"ss_sd_model_hash": legacy_hash_of_file(model)}, model) is None
    assert trained_on_another_file(facts, tmp_path) is None and trained_on_another_file({}, model) is None
