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
    torch.testing.assert_close(delta(module.low_rank()), u @ d)  # no alpha: the rank


def test_kohya_layout(tmp_path):
    tensors = lora_tensors(small_model(), 3, 1.5, only="mid_block")
    lora = read_lora(save(tmp_path / "a.safetensors", tensors))
    assert_close({name: delta(module.low_rank()).flatten(1) for name, module in lora.modules.items()}, products(tensors))


def test_alphas_of_diffusers_and_peft(tmp_path):
    u, d = factors()
    keys = {f"unet.{UNET}.to_q.lora_A.weight": d, f"unet.{UNET}.to_q.lora_B.weight": u}
    keys |= {f"unet.{UNET}.to_k.lora_A.weight": d, f"unet.{UNET}.to_k.lora_B.weight": u}
    config = {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {"attn1.to_k": 1}}
    lora = read_lora(save(tmp_path / "a.safetensors", keys, lora_adapter_metadata=json.dumps(config)))
    assert [module.low_rank().alpha for module in lora.modules.values()] == [1, 8]  # to_k, to_q
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "use_rslora": True}), encoding="utf-8")
    peft = {key.replace("unet.", "base_model.model.", 1): value for key, value in keys.items()}
    lora = read_lora(save(tmp_path / "adapter_model.safetensors", peft))
    assert [module.low_rank().scale for module in lora.modules.values()] == pytest.approx([3 / 2**0.5] * 2)


def test_the_file_s_own_alpha_stays_under_any_key(tmp_path):
    u, d = factors()
    keys = {f"unet.{UNET}.to_q.lora_A.weight": d, f"unet.{UNET}.to_q.lora_B.weight": u}
    keys[f"lora_unet_{UNET.replace('.', '_')}_to_q.alpha"] = torch.tensor(5.0)
    config = json.dumps({"unet.lora_alpha": 8, "unet.r": 2})
    (module,) = read_lora(save(tmp_path / "a.safetensors", keys, lora_adapter_metadata=config)).modules.values()
    assert module.low_rank().alpha == 5


def test_alpha_of_zero_is_the_rank(tmp_path):
    tensors = lora_tensors(small_model(), 3, 0.0, only="mid_block_attentions_0_proj_in")
    assert all(module.low_rank().alpha == 3 for module in read_lora(save(tmp_path / "a.safetensors", tensors)).modules.values())


NAME = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({f"{NAME}.hada_w1_a": (2, 2)}, "hada_w1_b is missing"),
        ({f"{NAME}.lambda_layer": (2,)}, "a T-LoRA"),
        ({f"unet.{UNET}.to_q.oft_R.weight": (2, 2)}, "an OFT of version 2"),
        ({"unet:0:up": (2, 2)}, "cloneofsimo"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (2, 2)},
            "a LoRA for Flux .* only LoRA files for SD 1.x or SD 2.x or SDXL",
        ),
        ({"transformer.transformer_blocks.1.attn.to_q.lora_A.weight": (2, 2)}, "a LoRA for another family of models"),
        ({"model.diffusion_model.out.2.weight": (4, 4, 3, 3)}, "a whole model"),
        ({"emb_params": (3, 768)}, "textual inversion"),
        ({"clip_l": (3, 768), "clip_g": (3, 1280)}, "textual inversion embedding"),
        ({"ip_adapter.1.to_k_ip.weight": (2, 2)}, "an IP-Adapter, not a LoRA"),
        ({"encoder.conv_in.weight": (4, 3, 3, 3)}, "a VAE, not a LoRA"),
        ({"lora_prior_unet_x.lora_up.weight": (2, 2)}, "a LoRA for Stable Cascade"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (2, 2)}, "a LoRA for another family of models"),
        ({"foo.weight": (3, 3)}, "foo.weight is not part of one, nor are the others"),
        ({"other.lora_down.weight": (3, 3)}, "other.lora_down.weight is not part of one"),
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
    with pytest.raises(UserError, match=f"b.safetensors: {NAME}.lora_up.weight holds NaN or infinity, .*; take an earlier file"):
        read_loras([good, save_lora(tmp_path / "b.safetensors", bad)])
    other = {f"{NAME}.lora_down.weight": torch.ones(2, 7), f"{NAME}.lora_up.weight": torch.ones(9, 2)}
    with pytest.raises(UserError, match="models of different kinds"):
        read_loras([good, save_lora(tmp_path / "c.safetensors", other)])


def test_what_is_no_part_of_the_lora_is_named_and_left_out(tmp_path, caplog):
    tensors = lora_tensors(small_model(), 2, only="mid_block_attentions_0_proj_in")
    empty = NAME.replace("proj_in", "proj_out")
    more = {
        "bundle_emb.word.emb_params": torch.zeros(2, 128),
        f"{empty}.lora_down.weight": torch.zeros(0, 4),
        f"{empty}.lora_up.weight": torch.zeros(4, 0),
        f"{NAME}.word": torch.zeros(1),
    }
    lora = read_lora(save(tmp_path / "a.safetensors", tensors | more))
    assert list(lora.modules) == [NAME] and set(lora.left_out) == set(more)
    assert "a.safetensors: left out, since no layer has a use for them: bundle_emb.word.emb_params, " in caplog.text


@pytest.mark.parametrize(
    "pattern, alpha",
    [
        ("attn1.to_k", 1),
        (r".*attn1\.to_k", 1),
        (f"^{UNET}.to_k", 1),
        ("attn[12].to_k", 1),
        ("to_(k|v)", 1),
        ("n1.to_k", 8),  # not from a dot on
        ("attn1", 8),
    ],
)
def test_alpha_pattern_is_a_regular_expression_as_in_peft(tmp_path, pattern, alpha):
    u, d = factors()
    peft = {f"base_model.model.{UNET}.to_k.lora_A.weight": d, f"base_model.model.{UNET}.to_k.lora_B.weight": u}
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (module,) = read_lora(save(tmp_path / "adapter_model.safetensors", peft)).modules.values()
    assert module.low_rank().alpha == alpha


@pytest.mark.parametrize(
    "other, name",
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("lora_unet_input_blocks_1_1_proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("lora_unet_output_blocks_5_2_conv", "lora_unet_up_blocks_1_upsamplers_0_conv"),
        ("lora_unet_middle_block_1_proj_in", NAME),
        ("lora_unet_time_embed_0", "lora_unet_time_embedding_linear_1"),
        ("oft_unet_mid_block_attentions_0_proj_in", NAME),
        ("lycoris_mid_block_attentions_0_proj_in", NAME),
        ("unet.mid_block.attentions.0.proj_in", NAME),
        ("unet.conv_in", "lora_unet_conv_in"),
    ],
)
def test_names_of_layers_in_other_layouts(other, name):
    assert lora_name(other) == name


def test_one_layer_under_two_names_is_an_error(tmp_path):
    u, d = factors()
    tensors = {f"{NAME}.lora_up.weight": u, f"{NAME}.lora_down.weight": d, "unet.mid_block.attentions.0.proj_in.lora_B.weight": u}
    with pytest.raises(UserError, match=f"a.safetensors: it holds {NAME}.lora_up.weight twice, the second time as unet"):
        read_lora(save(tmp_path / "a.safetensors", tensors))


def test_every_kind_is_read(tmp_path):
    one = {
        "LoHa": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
        "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (4, 3)},
        "IA3": {"on_input": (1,), "weight": (8, 1)},
        "OFT": {"oft_blocks": (2, 4, 4)},
        "full difference": {"diff": (8, 6), "diff_b": (8,)},
        "norm difference": {"w_norm": (8,), "b_norm": (8,)},
        "LoRA with DoRA": {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "lora_magnitude_vector.default.weight": (8,)},
    }
    for title, parts in one.items():
        tensors = {f"{NAME}.{name}": torch.ones(shape) for name, shape in parts.items()}
        (module,) = read_lora(save(tmp_path / "a.safetensors", tensors)).modules.values()
        assert module.title == title and not module.unknown
