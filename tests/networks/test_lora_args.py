"""--network_args: what each word does, and what is said about a wrong one."""

from __future__ import annotations

import math

import pytest

from library.formats.blocks import SD_BLOCKS
from library.key_values import read_pairs
from networks.lora import create_network, create_network_from_weights, parse_network_args

ROW = "2,4,4,4,8,8,8,8,12,12,12,12,16,12,12,12,12,8,8,8,8,4,4,4,2"
CONV_ROW = "2,2,2,2,4,4,4,4,6,6,6,6,8,6,6,6,6,4,4,4,4,2,2,2,2"


def make(model, dim=4, alpha=2.0, **network_args):
    return create_network(1.0, dim, alpha, None, model.text_encoder, model.unet, **network_args)


def by_block(network):
    """{block: {(rank, alpha, is 3x3)}} of the U-Net modules."""
    table: dict[int, set] = {}
    for module in network.parts["lora_unet"]:
        is_3x3 = module.lora_down.weight[0, 0].numel() == 9
        table.setdefault(SD_BLOCKS.block_index(module.lora_name), set()).add((module.rank, module.alpha.item(), is_3x3))
    return table


# ---------------------------------------------------------------- wrong words


@pytest.mark.parametrize(
    "network_args, message",
    [
        ({"conv_dm": "4"}, "unknown network_args key 'conv_dm'; did you mean 'conv_dim'?"),
        ({"zzz": "4"}, "unknown network_args key 'zzz'; known: conv_dim, conv_alpha, init, rs_lora, dora, dropout"),
        ({"conv_dim": "four"}, "network_args conv_dim=four: 'four' is not a whole number"),
        ({"conv_dim": "4.5"}, "network_args conv_dim=4.5: '4.5' is not a whole number"),
        ({"conv_dim": "4", "conv_alpha": "x"}, "network_args conv_alpha=x: 'x' is not a number"),
        ({"conv_dim": "4", "conv_alpha": "nan"}, "network_args conv_alpha=nan: 'nan' is not a number"),
        ({"conv_dim": "0"}, "conv_dim must be at least 1"),
        ({"rank_dropout": "1"}, "network_args rank_dropout=1: must be at least 0 and below 1"),
        ({"conv_alpha": "1"}, "network_args conv_alpha does nothing alone; give conv_dim or conv_block_dims too"),
        ({"block_alphas": ROW}, "network_args block_alphas does nothing alone"),
        ({"conv_block_dims": ROW}, "network_args conv_block_dims does nothing alone"),
        ({"block_dims": ROW, "conv_block_alphas": ROW}, "network_args conv_block_alphas .* alone; give conv_block_dims too"),
        ({"block_lr_zero_threshold": "0.1"}, "network_args block_lr_zero_threshold does nothing alone"),
        ({"block_dims": ROW, "conv_block_dims": ROW, "conv_dim": "4"}, "conv_dim and conv_block_dims both say"),
        (
            {"block_dims": "4"},
            "1 number given, 25 needed for .*: IN00 IN01 .* IN11 MID OUT00 .* OUT11; 23 needed for SDXL: EMB IN00",
        ),
        ({"block_dims": ROW + ",4"}, "26 numbers given, 25 needed"),
        ({"block_dims": ROW.replace("16", "-1")}, "'-1' is not a whole number"),
    ],
)
def test_trap_2_3_wrong_network_args_are_errors(model, network_args, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(model, **network_args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, message",
    [
        ("0.5", r"give 12 numbers \(9 for SDXL\) with commas, or a preset"),
        ("sinus", "with commas, or a preset .sine, cosine"),
        ("sine+x", "'x' is not a number"),
        (",".join(["1"] * 13), "13 numbers given, 12 needed"),
        ("1,,1", "give 12 numbers .* with commas"),
    ],
)
@pytest.mark.parametrize("key", ["down_lr_weight", "up_lr_weight"])
def test_trap_2_4_wrong_block_weights_are_errors(model, key, value, message):
    with pytest.raises(ValueError, match=f"network_args {key}=.*{message}"):
        make(model, **{key: value})


@pytest.mark.parametrize(
    "neuron_dropout, words, expected",
    [
        (None, {}, 0.0),
        (0.1, {}, 0.1),
        (None, {"dropout": "0.2"}, 0.2),
        (0.2, {"dropout": "0.2"}, 0.2),
        (0.1, {"dropout": None}, 0.1),
    ],
)
def test_trap_2_2_dropout_is_heard_from_either_place(model, neuron_dropout, words, expected):
    network = make(model, neuron_dropout=neuron_dropout, **words)
    assert {module.dropout for module in network.loras} == {expected}


def test_trap_2_2_two_different_dropouts_are_an_error(model):
    with pytest.raises(ValueError, match="--network_dropout 0.1 and network_args dropout=0.2 differ"):
        make(model, neuron_dropout=0.1, dropout="0.2")


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_a_network_dropout_out_of_range_is_an_error(model, share):
    with pytest.raises(ValueError, match="--network_dropout .*: must be at least 0 and below 1"):
        make(model, neuron_dropout=share)


@pytest.mark.parametrize("row", [ROW, f"[{ROW}]", f"({ROW},)", f"{ROW},", ROW.replace(",", " , ")])
def test_lists_and_words_in_any_usual_spelling(model, row):
    plain = make(model, block_dims=ROW, rs_lora="True")
    other = make(model, block_dims=row, rs_lora="on", dora="no")
    assert {m.lora_name: (m.rank, m.scale) for m in plain.loras} == {m.lora_name: (m.rank, m.scale) for m in other.loras}
    assert {module.rank for module in make(model, conv_dim="4.0").loras} >= {4}


@pytest.mark.parametrize(
    "text, value", [("4.", 4), ("1e1", 10), ("0x8", 8), ("1_6", 16), ("'4'", 4), ("4.5", None), ("true", None), ("[4]", None)]
)
def test_numbers_are_read_as_those_of_all_key_value_options_are(model, text, value):
    words = read_pairs([f"conv_dim={text}"], "--network_args")
    if value is None:
        with pytest.raises(ValueError, match="network_args conv_dim=.* is not a whole number"):
            parse_network_args(words)
    else:
        assert parse_network_args(words).conv_dim == value


def test_ranks_come_from_the_weights_with_a_warning_when_network_args_has_others(model, caplog):
    weights = make(model, dim=3).state_dict()
    network, _ = create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, weights, conv_dim="8")
    assert {module.rank for module in network.loras} == {3}
    assert "the ones in network_args are not used" in caplog.text


def test_dropouts_reach_every_module_also_from_weights(model):
    words = {"dropout": "0.1", "rank_dropout": "0.2", "module_dropout": "0.3"}
    network = make(model, **words)
    loaded, _ = create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, network.state_dict(), **words)
    for module in network.loras + loaded.loras:
        assert (module.dropout, module.rank_dropout, module.module_dropout) == (0.1, 0.2, 0.3)


def test_defaults_are_rank_4_alpha_1_and_conv_alpha_1(model):
    network = create_network(1.0, None, None, None, model.text_encoder, model.unet, conv_dim="2")
    assert {(m.rank, m.alpha.item()) for m in network.loras} == {(4, 1.0), (2, 1.0)}
    with pytest.raises(ValueError, match="network_dim must be at least 1"):
        make(model, dim=0)


# ---------------------------------------------------------------- blocks


def test_block_dims_of_the_document(model):
    ranks, conv_ranks = ([int(n) for n in row.split(",")] for row in (ROW, CONV_ROW))
    network = make(model, block_dims=ROW, conv_block_dims=CONV_ROW)
    assert {(m.rank, m.alpha.item()) for m in network.parts["lora_te"]} == {(4, 2.0)}
    for block, found in by_block(network).items():
        assert found <= {(ranks[block], 2.0, False), (conv_ranks[block], 1.0, True)}
    assert len(network.loras) == len(make(model, conv_dim="1").loras)


def test_block_alphas_and_conv_block_alphas(model):
    alphas, conv_alphas = [str(i + 1) for i in range(25)], [str(i + 51) for i in range(25)]
    network = make(
        model, block_dims=ROW, block_alphas=",".join(alphas), conv_block_dims=CONV_ROW, conv_block_alphas=",".join(conv_alphas)
    )
    for block, found in by_block(network).items():
        assert {(alpha, is_3x3) for _, alpha, is_3x3 in found} <= {(block + 1, False), (block + 51, True)}


def test_a_block_of_rank_zero_has_no_modules(model):
    dims = ["4"] * 25
    dims[12] = dims[4] = "0"
    blocks = by_block(make(model, block_dims=",".join(dims))).keys()
    assert blocks == by_block(make(model)).keys() - {12, 4}
    with_conv = by_block(make(model, block_dims=",".join(dims), conv_dim="2"))
    assert with_conv[12] == {(2, 1.0, True)}  # of that block, the 3x3 convolutions alone


def test_block_dims_without_convolution_ranks_has_no_3x3_and_conv_dim_serves_all_blocks(model):
    assert all(not is_3x3 for found in by_block(make(model, block_dims=ROW)).values() for *_, is_3x3 in found)
    network = make(model, block_dims=ROW, conv_dim="3", conv_alpha="5")
    assert {(r, a) for found in by_block(network).values() for r, a, is_3x3 in found if is_3x3} == {(3, 5.0)}


SINE = [0, 0.142315, 0.281733, 0.415415, 0.540641, 0.654861, 0.755750, 0.841254, 0.909632, 0.959493, 0.989821, 1]


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("sine", SINE),
        ("cosine", SINE[::-1]),
        ("linear", [i / 11 for i in range(12)]),
        ("reverse_linear", [1 - i / 11 for i in range(12)]),
        ("zeros+.5", [0.5] * 12),
        ("sine+.25", [x + 0.25 for x in SINE]),
        ("0.5,2", [0.5, 2, *[1] * 10]),
        ("0.5,", [0.5, *[1] * 11]),
    ],
)
def test_block_weight_presets_and_lists(preset, expected):
    weights = parse_network_args({"down_lr_weight": preset}).lr_weights
    assert list(weights[:12]) == pytest.approx(expected, abs=1e-6)
    assert list(weights[12:]) == [1.0] * 13
    assert list(parse_network_args({"up_lr_weight": preset}).lr_weights[13:]) == pytest.approx(expected, abs=1e-6)


def test_block_rates_of_the_document(model):
    network = make(
        model,
        down_lr_weight="0.5,0.5,0.5,0.5,1.0,1.0,1.0,1.0,1.5,1.5,1.5,1.5",
        mid_lr_weight="2.0",
        up_lr_weight="1.5,1.5,1.5,1.5,1.0,1.0,1.0,1.0,0.5,0.5,0.5,0.5",
    )
    groups, names = network.prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    assert names[0] == "textencoder" and names[-1] == "unet_block12"  # in the order of the modules: down, up, mid
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert (rates["unet_block1"], rates["unet_block12"], rates["unet_block22"]) == pytest.approx((0.5e-4, 2e-4, 0.5e-4))
    assert sum(len(group["params"]) for group in groups) == 2 * len(network.loras)


def test_blocks_at_or_below_the_threshold_have_no_modules(model):
    network = make(
        model, conv_dim="2", block_lr_zero_threshold="0.1", down_lr_weight="linear", mid_lr_weight="0.1", up_lr_weight="cosine+.5"
    )
    everything = by_block(make(model, conv_dim="2")).keys()
    assert by_block(network).keys() == everything - {1, 12}  # linear: block 1 is 1/11 = 0.09
    assert len(SD_BLOCKS.names) == 25


# ---------------------------------------------------------------- LoRA+


def test_loraplus_splits_each_group_into_down_and_faster_up(model):
    network = make(model, loraplus_lr_ratio="16", loraplus_text_encoder_lr_ratio="4")
    groups, names = network.prepare_optimizer_params(None, 1e-4, 1e-3)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 4e-3, 1e-4, 16e-4])
    assert {id(p) for p in groups[3]["params"]} == {id(m.lora_up.weight) for m in network.parts["lora_unet"]}
    only_unet = make(model, loraplus_unet_lr_ratio="2", mid_lr_weight="3")
    groups, names = only_unet.prepare_optimizer_params(None, None, 1e-3)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert "textencoder plus" not in rates
    assert (rates["unet_block12"], rates["unet_block12 plus"]) == pytest.approx((3e-3, 6e-3))
    assert math.isclose(rates["unet_block4 plus"], 2e-3)
