"""Several text encoders, and a U-Net whose paths are named as SDXL's files are: names, blocks, rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import dylora, lora
from networks.lora import create_network, create_network_from_weights


class CLIPMLP(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.fc1 = nn.Linear(size, size)


class Transformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(6, 6)


class ResnetBlock2D(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_layers = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Conv2d(6, 6, 3, padding=1)])


def text_encoder(size: int) -> nn.Module:
    encoder = nn.Module()
    encoder.text_model = nn.Module()
    encoder.text_model.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": CLIPMLP(size)}) for _ in "ab"])})
    return encoder


def sgm_unet() -> nn.Module:
    """A U-Net of layers alone, with the blocks of SDXL."""
    attention = {"input_blocks": (4, 5, 7, 8), "output_blocks": range(6)}
    unet = nn.Module()
    for side, with_attention in attention.items():
        blocks = [[ResnetBlock2D()] + [Transformer2DModel()] * (i in with_attention) for i in range(9)]
        setattr(unet, side, nn.ModuleList(nn.ModuleList(block) for block in blocks))
    unet.middle_block = nn.ModuleList([ResnetBlock2D(), Transformer2DModel(), ResnetBlock2D()])
    return unet


@pytest.fixture
def encoders() -> list[nn.Module]:
    return [text_encoder(4), text_encoder(5)]


@pytest.fixture
def unet() -> nn.Module:
    return sgm_unet()


def make(encoders, unet, **network_args):
    return create_network(1.0, 4, 2.0, None, encoders, unet, **network_args)


def test_one_encoder_is_te_and_several_are_te1_and_te2(encoders, unet):
    assert list(make(encoders, unet).parts) == ["lora_te1", "lora_te2", "lora_unet"]
    assert list(make(encoders[:1], unet).parts) == list(make(encoders[0], unet).parts) == ["lora_te", "lora_unet"]
    assert list(make([None, encoders[1]], None).parts) == ["lora_te2"]
    names = [module.lora_name for module in make(encoders, unet).loras]
    assert names[0] == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert names[4] == "lora_unet_input_blocks_4_1_proj_in"


@pytest.mark.parametrize("module, words", [(lora, {}), (dylora, {"unit": "2"})], ids=["lora", "DyLoRA"])
def test_trap_44_no_module_is_lost_or_named_twice(module, words, encoders, unet, tmp_path):
    torch.manual_seed(0)
    network = module.create_network(1.0, 4, 2.0, None, encoders, unet, **words)
    assert len(network.loras) == 4 + 11
    for lora_module in network.loras:
        nn.init.normal_(lora_module.lora_up.weight)
    network.on_epoch_start(encoders, unet)
    network.prepare_grad_etc(encoders, unet)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    loaded, weights = module.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, encoders, unet)
    loaded.load_state_dict(weights)
    assert len(weights) == 3 * len(network.loras) and list(loaded.parts) == list(network.parts)
    x = [torch.randn(2, 4), torch.randn(2, 5)]
    layers = [encoder.text_model.encoder["layers"][1]["mlp"].fc1 for encoder in encoders]
    base = [layer(part) for layer, part in zip(layers, x, strict=True)]
    loaded.eval().apply_to(encoders, unet)
    applied = [layer(part) for layer, part in zip(layers, x, strict=True)]
    loaded.unapply()
    loaded.merge_to(encoders, unet, weights)
    for layer, part, before, after in zip(layers, x, base, applied, strict=True):
        assert (after - before).abs().max() > 0.1
        torch.testing.assert_close(layer(part), after, atol=1e-5, rtol=1e-4)


def test_trap_43_a_network_with_conv_dim_leaves_later_ones_as_they_are(encoders, unet):
    counts = [len(make(encoders, unet, **words).loras) for words in ({}, {"conv_dim": "2"}, {})]
    assert counts == [15, 15 + 20, 15]


def test_encoders_may_be_left_out(encoders, unet):
    network = make(encoders, unet)
    network.apply_to(encoders, unet, apply_text_encoder=False)
    assert list(network.parts) == ["lora_unet"]


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(
    "rate, names, rates",
    [
        (1e-5, ["textencoder", "unet"], [1e-5, 1e-3]),
        ([1e-5], ["textencoder", "unet"], [1e-5, 1e-3]),
        (None, ["textencoder", "unet"], [1e-3, 1e-3]),
        ([1e-5, 2e-5], ["textencoder1", "textencoder2", "unet"], [1e-5, 2e-5, 1e-3]),
        ([0.0, 2e-5], ["textencoder2", "unet"], [2e-5, 1e-3]),
        ([1e-5, None], ["textencoder1", "textencoder2", "unet"], [1e-5, 1e-3, 1e-3]),
    ],
)
def test_trap_36_each_text_encoder_has_its_rate(encoders, unet, rate, names, rates):
    groups, found = make(encoders, unet).prepare_optimizer_params(rate, None, 1e-3)
    assert found == names and [group["lr"] for group in groups] == rates


def test_rates_that_fit_no_text_encoder_are_an_error(encoders, unet):
    with pytest.raises(ValueError, match="--text_encoder_lr has 2 rates; give one, or one for each text encoder"):
        make(encoders[0], unet).prepare_optimizer_params([1e-5, 1e-5], None, 1e-3)


def test_modules_that_no_gradient_reaches_are_in_files_and_in_no_group(encoders, unet):
    network = make(encoders, unet)
    dead = network.parts["lora_te1"][-1]
    network.untrained = frozenset({dead.lora_name})
    network.prepare_grad_etc(encoders, unet)
    groups, _ = network.prepare_optimizer_params(None, None, 1e-3)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in network.get_trainable_params()} == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(trained) == 2 * (len(network.loras) - 1) and not any(p.requires_grad for p in dead.parameters())
    assert f"{dead.lora_name}.lora_up.weight" in network.file_weights()


# ---------------------------------------------------------------- blocks


def test_block_ranks_of_sdxl(encoders, unet):
    ranks = [str(i + 1) for i in range(23)]
    network = make(encoders, unet, block_dims=",".join(ranks), conv_dim="30")
    found = {module.lora_name: module.rank for module in network.loras}
    assert found["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == 4
    assert found["lora_unet_input_blocks_4_1_proj_in"] == 6 and found["lora_unet_output_blocks_0_1_proj_in"] == 14
    assert found["lora_unet_middle_block_1_proj_in"] == 12 and found["lora_unet_middle_block_1_proj_in"] == 12
    assert found["lora_unet_middle_block_2_in_layers_2"] == 30


@pytest.mark.parametrize(
    "words, message",
    [
        (
            {"block_dims": ",".join("4" * 25)},
            "block_dims: 25 numbers given, 23 needed for SDXL: EMB IN00 .* MID0 MID1 MID2 .* OUT",
        ),
        ({"down_lr_weight": ",".join("1" * 12)}, "down_lr_weight: 12 numbers given, 9 needed for SDXL: IN00 .* IN08"),
        ({"up_lr_weight": ",".join("1" * 10)}, "up_lr_weight: 10 numbers given, 9 needed for SDXL: OUT00 .* OUT08"),
        ({"mid_lr_weight": "1,1"}, "mid_lr_weight=1,1: 2 numbers given; give 1, or one for each middle block"),
    ],
)
def test_trap_42_numbers_for_other_blocks_are_an_error_that_names_them(encoders, unet, words, message):
    with pytest.raises(ValueError, match=f"network_args {message}"):
        make(encoders, unet, **words)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"block_dims": ",".join("4" * 23)}, "block_dims: 23 numbers given, 25 needed for Stable Diffusion 1.x .* IN00 .* OUT11"),
        ({"mid_lr_weight": "1,1,1"}, "mid_lr_weight: 3 numbers given, 1 needed for .*: MID"),
    ],
)
def test_trap_42_and_so_are_those_of_sdxl_for_another_model(model, words, message):
    with pytest.raises(ValueError, match=f"network_args {message}"):
        create_network(1.0, 4, 1.0, None, model.text_encoder, model.unet, **words)


def test_block_rates_of_sdxl(encoders, unet):
    network = make(encoders, unet, down_lr_weight="sine", mid_lr_weight="0.5", up_lr_weight="0.25,", conv_dim="2")
    weights = network.args.lr_weights
    sine = [0, 0.195, 0.383, 0.556, 0.707, 0.831, 0.924, 0.981, 1]
    assert list(weights) == pytest.approx([1, *sine, 0.5, 0.5, 0.5, 0.25, *[1] * 8, 1], abs=1e-3)
    groups, names = network.prepare_optimizer_params(None, 1e-3, 1e-4)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert "unet_block1" not in rates  # weight 0: no modules
    assert (rates["unet_block11"], rates["unet_block13"], rates["unet_block9"]) == pytest.approx((0.5e-3, 0.25e-3, 1e-3))
    assert all(f"unet_block{block}" in rates for block in range(10, 13))


def test_weights_of_their_own_for_the_middle_and_the_summary(encoders, unet):
    network = make(encoders, unet, mid_lr_weight="0.5,1,2")
    assert network.args.lr_weights[10:13] == (0.5, 1, 2)
    lines = network.summary().splitlines()
    assert lines[1].startswith("  text encoder 1: 2 modules") and lines[2].startswith("  text encoder 2: 2 modules")
    assert any(line.startswith("  MID1 ") for line in lines)
    assert list(create_network_from_weights(1.0, None, None, encoders, unet, network.state_dict())[0].parts) == list(
        network.parts
    )
