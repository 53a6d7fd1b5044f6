"""Names and shapes at full size (marked tensors that take no memory), values on the small models, both against Diffusers."""

from __future__ import annotations

import pytest
import torch

from library.formats.compvis import SD1_LAYOUT, SD2_LAYOUT, join_compvis, split_compvis
from library.formats.names import OLD_CLIP_PREFIX, OPEN_CLIP_PREFIX, modern_vae_name, vae_to_diffusers
from library.models.clip import empty_text_encoder
from library.models.modules import weights_of
from library.models.unet import empty_unet
from library.models.vae import empty_vae
from library.testing import sd2_configs, sd15_configs


@pytest.fixture(scope="module", params=[False, True], ids=["v1", "v2"])
def v2(request):
    return request.param


@pytest.fixture(scope="module")
def full_size(v2):
    """Full-size parts whose every tensor is one number of its own, spread over the shape without memory."""
    configs = sd2_configs() if v2 else sd15_configs()
    states = {
        "unet": empty_unet(configs["unet"]).state_dict(),
        "vae": empty_vae(configs["vae"]).state_dict(),
        "text_encoder": weights_of(empty_text_encoder(configs["text_encoder"])),
    }
    count = iter(range(1, 10_000))
    return {
        part: {name: torch.tensor(next(count), dtype=torch.int16).expand(value.shape) for name, value in values.items()}
        for part, values in states.items()
    }


def summary(tensors):
    """Name -> shape and the numbers at 3 places of the first axis: tells marked tensors and joined ones apart."""
    result = {}
    for name, value in tensors.items():
        rows = [0, value.shape[0] // 2, value.shape[0] - 1] if value.dim() else []
        result[name] = tuple(value.shape), [value[row].flatten()[0].item() for row in rows] or value.item()
    return result


def test_full_size_there_and_back(full_size, v2):
    compvis = join_compvis(full_size, SD2_LAYOUT if v2 else SD1_LAYOUT)
    parts, extra = split_compvis(compvis, SD2_LAYOUT if v2 else SD1_LAYOUT)
    for part, values in full_size.items():
        assert summary(parts[part]) == summary(values)
    # And from CompVis' side, with what real files hold beside the models.
    compvis["betas"] = torch.linspace(0, 1, 1000)
    compvis["model_ema.diffusion_modelinput_blocks00weight"] = torch.ones(3)
    if not v2:
        compvis["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    parts, extra = split_compvis(compvis, SD2_LAYOUT if v2 else SD1_LAYOUT)
    assert ("betas" in extra) and len(extra) >= 3 - v2
    assert summary(join_compvis(parts, SD2_LAYOUT if v2 else SD1_LAYOUT, extra=extra)) == summary(compvis)


def test_full_size_names_are_those_of_real_files(full_size, v2):
    shapes = {name: tuple(value.shape) for name, value in join_compvis(full_size, SD2_LAYOUT if v2 else SD1_LAYOUT).items()}
    unet, vae = "model.diffusion_model.", "first_stage_model."
    context = 1024 if v2 else 768
    known = {
        unet + "time_embed.2.weight": (1280, 1280),
        unet + "input_blocks.0.0.weight": (320, 4, 3, 3),
        unet + "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        unet + "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        unet + "input_blocks.8.1.transformer_blocks.0.attn2.to_v.weight": (1280, context),
        unet + "input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
        unet + "middle_block.1.proj_in.weight": (1280, 1280) if v2 else (1280, 1280, 1, 1),
        unet + "middle_block.2.out_layers.3.bias": (1280,),
        unet + "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        unet + "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        unet + "output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
        unet + "out.2.weight": (4, 320, 3, 3),
        vae + "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        vae + "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        vae + "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        vae + "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        vae + "quant_conv.weight": (8, 8, 1, 1),
    }
    if v2:
        known |= {
            OPEN_CLIP_PREFIX + "transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
            OPEN_CLIP_PREFIX + "transformer.resblocks.22.mlp.c_fc.bias": (4096,),
            OPEN_CLIP_PREFIX + "positional_embedding": (77, 1024),
            OPEN_CLIP_PREFIX + "token_embedding.weight": (49408, 1024),
            OPEN_CLIP_PREFIX + "text_projection": (1024, 1024),
            OPEN_CLIP_PREFIX + "ln_final.weight": (1024,),
        }
    else:
        known["cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight"] = (768, 768)
    assert {name: shapes.get(name) for name in known} == known
    counts = [sum(name.startswith(prefix) for name in shapes) for prefix in (unet, vae, "cond_stage_model.")]
    assert counts == [686, 248, 24 * 12 + 6 if v2 else 12 * 16 + 4]


def test_full_size_as_diffusers_converts(full_size, v2):
    from diffusers.loaders import single_file_utils as theirs

    configs = sd2_configs() if v2 else sd15_configs()
    compvis = join_compvis(full_size, SD2_LAYOUT if v2 else SD1_LAYOUT)
    assert summary(theirs.convert_ldm_unet_checkpoint(dict(compvis), configs["unet"])) == summary(full_size["unet"])
    assert summary(theirs.convert_ldm_vae_checkpoint(dict(compvis), configs["vae"])) == summary(full_size["vae"])
    if v2:
        text = theirs.convert_open_clip_checkpoint(empty_text_encoder(configs["text_encoder"]), compvis, OPEN_CLIP_PREFIX)
        text.pop("text_projection.weight", None)
    else:
        text = theirs.convert_ldm_clip_checkpoint(compvis)
    text = {name.removeprefix("text_model."): value for name, value in text.items()}
    assert summary(text) == summary(full_size["text_encoder"])


def test_small_values_are_bit_identical(small_models, v2):
    model = small_models[v2]
    parts = {
        "unet": model.denoiser.state_dict(),
        "vae": model.vae.state_dict(),
        "text_encoder": weights_of(model.text_encoders[0]),
    }
    compvis = join_compvis(parts, SD2_LAYOUT if v2 else SD1_LAYOUT)
    back, extra = split_compvis(compvis, SD2_LAYOUT if v2 else SD1_LAYOUT)
    for part, values in parts.items():
        assert back[part].keys() == values.keys()
        assert all(torch.equal(back[part][name], value) for name, value in values.items())
    again = join_compvis(back, SD2_LAYOUT if v2 else SD1_LAYOUT, extra=extra)
    assert again.keys() == compvis.keys()
    assert all(torch.equal(again[name], value) for name, value in compvis.items())


def test_old_clip_names_there_and_back(small_models):
    model = small_models[False]
    parts = {
        "unet": model.denoiser.state_dict(),
        "vae": model.vae.state_dict(),
        "text_encoder": weights_of(model.text_encoders[0]),
    }
    old = join_compvis(parts, SD1_LAYOUT, prefixes={"text_encoder": OLD_CLIP_PREFIX})
    assert OLD_CLIP_PREFIX + "final_layer_norm.weight" in old
    assert not any("text_model" in name for name in old)
    back, extra = split_compvis(old, SD1_LAYOUT)
    assert not extra and back["text_encoder"].keys() == parts["text_encoder"].keys()


def test_old_diffusers_vae_names():
    assert modern_vae_name("encoder.mid_block.attentions.0.proj_attn.bias") == "encoder.mid_block.attentions.0.to_out.0.bias"
    assert modern_vae_name("decoder.mid_block.attentions.0.query.weight") == "decoder.mid_block.attentions.0.to_q.weight"
    assert modern_vae_name("decoder.conv_in.weight") == "decoder.conv_in.weight"


def test_full_size_lora_targets_exist(full_size, v2):
    """The 16 transformer blocks and the text layers that LoRA names are made of (138 text modules for SD 2: 23 layers)."""
    assert sum(name.endswith("attn1.to_q.weight") for name in full_size["unet"]) == 16
    assert sum(name.endswith("self_attn.q_proj.weight") for name in full_size["text_encoder"]) == (23 if v2 else 12)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 4, 1, 1)])
def test_attention_of_a_vae_in_any_shape_is_read(shape):
    """A shape that no VAE has is found later, with the file's name: here nothing may fail."""
    name = "decoder.mid_block.attentions.0.to_q.weight"
    assert vae_to_diffusers(name, torch.zeros(shape)).dim() == min(len(shape), 2)
