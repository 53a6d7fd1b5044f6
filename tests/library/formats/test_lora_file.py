"""LoRA files in every layout, and files that are none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tool_files import assert_close, lora_tensors, products, save_lora, small_model

from library.errors import UserError
from library.formats.lora_file import read_lora, read_loras
from library.formats.lora_layouts import lora_name
from library.formats.low_rank import delta

UNET = "mid_block.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def factors(rank=2, width=6):
    return torch.randn(width, rank), torch.randn(rank, width)


def save(path, tensors, **metadata):
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, path, metadata or None)
    return path


@pytest.mark.parametrize(
    "path, name",
    [
        (f"unet.{UNET}.to_q", "attn1_to_q"),
        (f"base_model.model.{UNET}.to_out.0", "attn1_to_out_0"),
        (f"unet.{UNET}.processor.to_out", "attn1_to_out_0"),
        (f"{UNET}.processor.to_k", "attn1_to_k"),
    ],
)
def test_unet_names_of_all_layouts(path, name):
    assert lora_name(path) == f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{name}"


@pytest.mark.parametrize(
    "path", [f"text_encoder.{TEXT}", TEXT, f"base_model.model.{TEXT}", f"text_encoder.{TEXT.removeprefix('text_model.')}"]
)
def test_text_encoder_names_of_all_layouts(path):
    assert lora_name(path) == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize(
    "down, up",
    [
        ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
        ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        ("unet.{}_lora.down.weight", "unet.{}_lora.up.weight"),
        ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight"),
    ],
)
def test_keys_of_all_layouts(tmp_path, down, up):
    u, d = factors()
    lora = read_lora(save(tmp_path / "a.safetensors", {down.format(f"{UNET}.to_q"): d, up.format(f"{UNET}.to_q"): u}))
    ((name, module),) = lora.modules.items()
    assert name == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    torch.testing.assert_close(delta(module), u @ d)  # no alpha: the rank


def test_kohya_layout(tmp_path):
    tensors = lora_tensors(small_model(), 3, 1.5, only="mid_block")
    lora = read_lora(save(tmp_path / "a.safetensors", tensors))
    assert_close({name: delta(module).flatten(1) for name, module in lora.modules.items()}, products(tensors))


def test_alphas_of_diffusers_and_peft(tmp_path):
    u, d = factors()
    keys = {f"unet.{UNET}.to_q.lora_A.weight": d, f"unet.{UNET}.to_q.lora_B.weight": u}
    keys |= {f"unet.{UNET}.to_k.lora_A.weight": d, f"unet.{UNET}.to_k.lora_B.weight": u}
    config = {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {"attn1.to_k": 1}}
    lora = read_lora(save(tmp_path / "a.safetensors", keys, lora_adapter_metadata=json.dumps(config)))
    assert [module.alpha for module in lora.modules.values()] == [1, 8]  # to_k, to_q
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "use_rslora": True}), encoding="utf-8")
    peft = {key.replace("unet.", "base_model.model.", 1): value for key, value in keys.items()}
    lora = read_lora(save(tmp_path / "adapter_model.safetensors", peft))
    assert [module.scale for module in lora.modules.values()] == pytest.approx([3 / 2**0.5] * 2)


def test_alpha_of_zero_is_the_rank(tmp_path):
    tensors = lora_tensors(small_model(), 3, 0.0, only="mid_block_attentions_0_proj_in")
    assert all(module.alpha == 3 for module in read_lora(save(tmp_path / "a.safetensors", tensors)).modules.values())


NAME = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({f"{NAME}.hada_w1_a": (2, 2)}, "a LoHa file"),
        ({f"{NAME}.lokr_w1": (2, 2)}, "a LoKr file"),
        ({f"{NAME}.lora_down.weight": (2, 4), f"{NAME}.lora_up.weight": (4, 2), f"{NAME}.dora_scale": (4, 1)}, "a DoRA file"),
        ({f"{NAME}.lora_mid.weight": (2, 2, 3, 3)}, "Tucker"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (2, 2)}, "SDXL"),
        ({"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": (2, 2)}, "SDXL"),
        ({"model.diffusion_model.out.2.weight": (4, 4, 3, 3)}, "a whole model"),
        ({"emb_params": (3, 768)}, "textual inversion"),
        ({"foo.weight": (3, 3)}, "foo.weight is not part of one"),
        ({"other.lora_down.weight": (3, 3)}, "named in no layout"),
        ({f"{NAME}.lora_down.weight": (2, 4)}, "has no up weight"),
        ({f"{NAME}.lora_down.weight": (2, 4), f"{NAME}.lora_up.weight": (4, 3)}, "do not fit together"),
        ({f"{NAME}.lora_down.weight": (2, 4), f"{NAME}.lora_up.weight": (4, 2, 3, 3)}, "do not fit together"),
        ({f"{NAME}.lora_down.weight": (2,), f"{NAME}.lora_up.weight": (4, 2)}, "do not fit together"),
        ({f"{NAME}.lora_down.weight": (2, 4), f"{NAME}.lora_up.weight": (4, 2), f"{NAME}.alpha": (2,)}, "no single number"),
    ],
)
def test_what_is_no_lora_is_named(tmp_path, tensors, message):
    path = save(tmp_path / "a.safetensors", {key: torch.ones(shape) for key, shape in tensors.items()})
    with pytest.raises(UserError, match=message) as caught:
        read_lora(path)
    assert "a.safetensors" in str(caught.value)


def test_nan_and_other_sizes_are_refused_when_files_are_combined(tmp_path):
    tensors = lora_tensors(small_model(), 2, only="mid_block_attentions_0_proj_in")
    good = save_lora(tmp_path / "a.safetensors", tensors)
    bad = {key: value * float("nan") if "lora_up" in key else value for key, value in tensors.items()}
    with pytest.raises(UserError, match=f"{NAME} holds NaN"):
        read_loras([good, save_lora(tmp_path / "b.safetensors", bad)])
    other = {f"{NAME}.lora_down.weight": torch.ones(2, 7), f"{NAME}.lora_up.weight": torch.ones(9, 2)}
    with pytest.raises(UserError, match="models of different kinds"):
        read_loras([good, save_lora(tmp_path / "c.safetensors", other)])
