"""Other kinds of adapters on a model: what is drawn is what is merged, and the model is itself again afterwards."""

from __future__ import annotations

import pytest
import torch
from kind_files import CONV, KINDS, LAYER, NORM, file_of, random
from safetensors.torch import load_file, save_file
from tool_files import lora_tensors, small_model

from networks.adapters import AdapterModule
from networks.lora import create_network, create_network_from_weights


@pytest.fixture(scope="module")
def parts():
    model = small_model()
    return model.text_encoders[0], model.denoiser


def files(unet):
    size, conv_in = len(unet.mid_block.attentions[0].norm.weight), unet.conv_in.weight
    down = unet.time_embedding.linear_1.weight
    generator = torch.Generator().manual_seed(2)
    outside = {
        "lora_unet_conv_in.lora_up.weight": torch.randn(len(conv_in), 2, 1, 1, generator=generator) * 0.1,
        "lora_unet_conv_in.lora_down.weight": torch.randn(2, *conv_in.shape[1:], generator=generator) * 0.1,
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.randn(len(down), 2, generator=generator) * 0.1,
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.randn(2, down.shape[1], generator=generator) * 0.1,
    }
    return {
        **{name: file_of(name) for name in KINDS},
        "norm": random({"w_norm": (size,), "b_norm": (size,)}, NORM),
        "bias": random({"diff_b": (64,)}, CONV),
        "kernel": random({"diff": (64, 64, 3, 3), "diff_b": (64,)}, CONV),
        "outside of the blocks": outside,
    }


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(1, 4, 32, 32, generator=generator),
        torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator),
    )
    return unet(latents, torch.tensor([500]), text).sample


@pytest.mark.parametrize("what", [*KINDS, "norm", "bias", "kernel", "outside of the blocks"])
def test_drawn_is_merged(parts, what):
    text_encoder, unet = parts
    weights, before = files(unet)[what], output(unet)
    network, own = create_network_from_weights(0.7, None, None, text_encoder, unet, weights)
    network.apply_to(text_encoder, unet)
    network.load_state_dict(own)
    drawn = output(unet)
    network.unapply()
    assert torch.equal(output(unet), before) and not torch.allclose(drawn, before, atol=1e-5)
    kept = {name: value.detach().clone() for name, value in unet.named_parameters()}
    network.merge_to(text_encoder, unet, own)
    torch.testing.assert_close(output(unet), drawn, atol=2e-5, rtol=1e-3)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            value.copy_(kept[name])


def test_loras_of_layers_that_get_none_in_training_here_train_on(parts, tmp_path):
    text_encoder, unet = parts
    weights = files(unet)["outside of the blocks"]
    save_file(weights, tmp_path / "a.safetensors")
    network, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.load_weights(tmp_path / "a.safetensors")
    groups, _ = network.prepare_optimizer_params(None, None, 1e-2)
    optimizer = torch.optim.SGD(groups)
    before = output(unet)
    unet(torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 7, unet.config.cross_attention_dim)).sample.sum().backward()
    optimizer.step()
    assert not torch.equal(output(unet), before)
    network.unapply()
    network.save_weights(tmp_path / "b.safetensors", None, None)
    trained = load_file(tmp_path / "b.safetensors")
    assert weights.keys() < trained.keys() and not any(torch.equal(trained[key], weights[key]) for key in weights)
    assert "2 modules" in network.summary()


def test_strength_and_switch(parts):
    text_encoder, unet = parts
    before = output(unet)
    network, _ = create_network_from_weights(1.0, None, None, text_encoder, unet, files(unet)["kernel"])
    network.apply_to(text_encoder, unet)
    assert isinstance(network.loras[0], AdapterModule)
    network.set_multiplier(0.0)
    assert torch.equal(output(unet), before)
    network.set_multiplier(1.0)
    assert not torch.equal(output(unet), before)
    network.set_enabled(False)
    assert torch.equal(output(unet), before)
    network.unapply()


def test_training_other_kinds_is_refused_with_the_cure(parts, tmp_path):
    text_encoder, unet = parts
    save_file(files(unet)["LoHa"], tmp_path / "loha.safetensors")
    for network in (
        create_network(1.0, 4, 1.0, None, text_encoder, unet),
        create_network_from_weights(1.0, tmp_path / "loha.safetensors", None, text_encoder, unet)[0],
    ):
        with pytest.raises(ValueError, match=r"attn1_to_q \(LoHa\) is nothing that networks.lora trains; use lycoris.kohya"):
            network.load_weights(tmp_path / "loha.safetensors")


@pytest.mark.parametrize("what", [kind for kind in KINDS if not kind.startswith("LoRA")] + ["norm", "kernel"])
def test_another_kind_beside_loras_is_not_dropped_when_training_goes_on(parts, what, tmp_path):
    loras = {key: t for key, t in lora_tensors(small_model(), 4).items() if key.partition(".")[0] not in (LAYER, CONV)}
    save_file(loras | files(parts[1])[what], tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="is nothing that networks.lora trains; use lycoris.kohya"):
        create_network(1.0, 4, 1.0, None, *parts).load_weights(tmp_path / "mixed.safetensors")


@pytest.mark.parametrize("name", ["a.SAFETENSORS", "a.sft", "safetensors.ckpt", "wrapped.pt"])
def test_a_file_is_recognised_by_its_content(parts, name, tmp_path):
    tensors = lora_tensors(small_model(), 2, only="mid_block")
    if name == "wrapped.pt":
        torch.save({"state_dict": tensors}, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    network, _ = create_network_from_weights(1.0, tmp_path / name, None, *parts)
    assert len(network.loras) == len({key.partition(".")[0] for key in tensors})


@pytest.mark.parametrize(
    "old, new",
    [
        ("lora_te_text", "lora_te1_text"),
        ("lora_unet_mid_block_attentions_0", "lora_unet_middle_block_1"),
        ("lora_unet_down_blocks_0_attentions_0", "lora_unet_input_blocks_1_1"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
    ],
)
def test_other_names_of_layers_are_known(parts, old, new):
    tensors = {key.replace(old, new): t for key, t in lora_tensors(small_model(), 2).items() if key.startswith(old)}
    network, own = create_network_from_weights(1.0, None, None, *parts, tensors)
    assert tensors and len(own) == len(tensors) and all(key.startswith(old) for key in own)
    network.load_state_dict(own)


def test_what_has_no_layer_is_left_out(parts):
    tensors = lora_tensors(small_model(), 2, only="mid_block_attentions_0_proj")
    empty = "lora_unet_mid_block_attentions_0_proj_out"
    tensors |= {f"{empty}.lora_up.weight": torch.zeros(64, 0, 1, 1), f"{empty}.lora_down.weight": torch.zeros(0, 64, 1, 1)}
    network, own = create_network_from_weights(1.0, None, None, *parts, tensors | {"bundle_emb.word.clip_l": torch.zeros(2, 8)})
    assert [module.lora_name for module in network.loras] == ["lora_unet_mid_block_attentions_0_proj_in"]
    network.load_state_dict(own, strict=True)
