"""Every kind of network on SDXL: names, ranks and rates by block, files, applied and merged, and what no gradient reaches."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest
import torch

from library.formats.blocks import SDXL_BLOCKS
from library.models import sdxl
from library.models.clip import tokenize
from library.models.family import Model
from library.testing import sdxl_configs, small_sdxl
from networks import dylora, lora

KEYS = Path(__file__).parents[1] / "data" / "lora-keys-sdxl.csv"
KINDS = {
    "LierLa": (lora, {}),
    "C3Lier": (lora, {"conv_dim": "2"}),
    "DyLoRA": (dylora, {"conv_dim": "4", "unit": "2"}),
    "DoRA": (lora, {"dora": "True", "conv_dim": "2"}),
    "PiSSA": (lora, {"init": "pissa"}),
    "orthogonal": (lora, {"init": "orthogonal"}),
    "rsLoRA": (lora, {"rs_lora": "True"}),
}


@pytest.fixture(scope="module")
def model() -> Model:
    """Tests leave its weights as they are."""
    return small_sdxl(seed=4)


def make(model, kind="LierLa", **words):
    """A network of this kind, with random weights, in eval mode."""
    module, own = KINDS[kind]
    torch.manual_seed(0)
    network = module.create_network(1.0, 4, 2.0, None, *model.for_networks(), **own, **words).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


@torch.no_grad()
def predicted(model) -> torch.Tensor:
    text = model.encode_text(tokenize(model.tokenizers, ["a red square"]))
    return model.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), text, torch.tensor([[64, 64, 0, 0, 64, 64]]))


@cache
def full_size() -> Model:
    """On the meta device."""
    configs = sdxl_configs()
    return Model(
        sdxl.FAMILY, {part.name: part.build(configs[part.name]) for part in sdxl.FAMILY.parts}, [], "epsilon", "full size"
    )


@pytest.mark.parametrize("with_conv, unet_modules", [(False, 722), (True, 788)])
def test_trap_44_a_dylora_of_full_size_has_every_listed_name_and_none_twice(with_conv, unet_modules):
    words = {"conv_dim": "4"} if with_conv else {}
    network = dylora.create_network(1.0, 4, 1.0, None, *full_size().for_networks(), **words)
    with open(KEYS, encoding="utf-8", newline="") as file:
        column = "in_conv_dim" if with_conv else "in_default"
        listed = [row["name"] for row in csv.DictReader(file) if row[column] == "yes"]
    assert sorted(module.lora_name for module in network.loras) == sorted(listed)
    counts = {prefix: len(modules) for prefix, modules in network.parts.items()}
    assert counts == {"lora_te1": 72, "lora_te2": 192, "lora_unet": unet_modules}


@pytest.mark.parametrize("kind", KINDS)
def test_trap_44_a_file_of_each_kind_does_applied_and_merged_what_the_network_did(model, kind, tmp_path):
    network, base = make(model, kind), predicted(model)
    network.apply_to(*model.for_networks())
    wanted = predicted(model)
    network.unapply()
    assert torch.equal(predicted(model), base) and (wanted - base).abs().max() > 1e-3
    network.save_weights(tmp_path / "a.safetensors", None, {})
    loaded, weights = lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, *model.for_networks())
    assert {key.partition(".")[0] for key in weights} == {module.lora_name for module in network.loras}
    loaded.eval().apply_to(*model.for_networks())
    result = loaded.load_state_dict(weights)
    applied = predicted(model)
    loaded.unapply()
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(applied, wanted, rtol=1e-3, atol=1e-5)
    other = small_sdxl(seed=4)
    loaded.merge_to(*other.for_networks(), weights)
    torch.testing.assert_close(predicted(other), wanted, rtol=1e-3, atol=1e-4)


def test_trap_43_a_network_with_conv_dim_leaves_later_ones_as_they_are(model):
    first, with_conv, later = (len(make(model, kind).loras) for kind in ("LierLa", "C3Lier", "LierLa"))
    assert first == later < with_conv


# ---------------------------------------------------------------- blocks


def test_trap_42_block_ranks_are_23_and_each_module_has_that_of_its_slot(model):
    ranks = [*range(2, 24), 3]
    network = make(model, block_dims=",".join(map(str, ranks)), conv_block_dims=",".join(["1"] * 23))
    of_slots = set()
    for module in network.parts["lora_unet"]:
        slot = SDXL_BLOCKS.block_index(module.lora_name)
        is_3x3 = lora.kernel_size(module.lora_down) > 1
        assert module.rank == (1 if is_3x3 else ranks[slot]), module.lora_name
        of_slots.add(SDXL_BLOCKS.names[slot])
    assert {"IN01", "IN03", "MID0", "MID1", "MID2", "OUT00", "OUT08"} <= of_slots
    assert {module.rank for part in ("lora_te1", "lora_te2") for module in network.parts[part]} == {4}


def numbers(count: int) -> str:
    return ",".join(["4"] * count)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"block_dims": numbers(25)}, "block_dims: 25 numbers given, 23 needed for SDXL: EMB IN00 .*MID0 MID1 MID2 OUT00 .*OUT"),
        ({"block_alphas": numbers(25), "block_dims": numbers(23)}, "block_alphas: 25 numbers given, 23 needed"),
        ({"conv_block_dims": numbers(12), "block_dims": numbers(23)}, "conv_block_dims=.*: 12 numbers given, .*23 needed"),
        ({"down_lr_weight": numbers(12)}, "down_lr_weight: 12 numbers given, 9 needed for SDXL: IN00 .* IN08"),
        ({"up_lr_weight": numbers(12)}, "up_lr_weight: 12 numbers given, 9 needed for SDXL: OUT00 .* OUT08"),
        ({"down_lr_weight": numbers(25)}, "down_lr_weight=.*: 25 numbers given, 12 needed .*; 9 needed for SDXL: IN00 .* IN08$"),
        ({"up_lr_weight": numbers(25)}, "up_lr_weight=.*: 25 numbers given, 12 needed .*; 9 needed for SDXL: OUT00 .* OUT08$"),
    ],
)
def test_trap_42_as_many_numbers_as_sd_1_has_are_an_error_with_the_slots_by_name(model, words, message):
    with pytest.raises(ValueError, match=f"network_args {message}"):
        make(model, **words)


@pytest.mark.parametrize("preset", ["sine", "cosine", "linear", "reverse_linear", "zeros"])
def test_trap_42_presets_go_over_9_blocks_from_end_to_end(model, preset):
    weights = make(model, down_lr_weight=f"{preset}+0.5", up_lr_weight=f"{preset}+0.5", mid_lr_weight="2").args.lr_weights
    ends = {"sine": (0, 1), "cosine": (1, 0), "linear": (0, 1), "reverse_linear": (1, 0), "zeros": (0, 0)}[preset]
    for side in (weights[1:10], weights[13:22]):
        assert len(side) == 9 and (side[0], side[-1]) == pytest.approx((ends[0] + 0.5, ends[1] + 0.5), abs=1e-6)
        assert preset == "zeros" or len(set(side)) == 9
    assert weights[10:13] == (2, 2, 2) and weights[0] == weights[22] == 1


# ---------------------------------------------------------------- text encoders


def test_trap_36_each_text_encoder_has_a_rate(model):
    network = make(model)
    groups, names = network.prepare_optimizer_params([5e-5, 1e-5], 1e-4, 1e-3)
    found = {name: (group["lr"], len(group["params"])) for name, group in zip(names, groups, strict=True)}
    sizes = {prefix: 2 * len(modules) for prefix, modules in network.parts.items()}
    assert found == {
        "textencoder1": (5e-5, sizes["lora_te1"]), "textencoder2": (1e-5, sizes["lora_te2"]), "unet": (1e-4, sizes["lora_unet"]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_trap_38_what_no_gradient_reaches_is_in_files_and_in_no_group_or_norm(model, kind, tmp_path):
    network = make(model, kind)
    network.apply_to(*model.for_networks())
    network.leave_untrained(*model.for_networks(), model.unread_layers())
    network.requires_grad_(True)
    network.prepare_grad_etc(*model.for_networks())
    last = {module.lora_name for module in network.loras if module.lora_name.startswith("lora_te1_text_model_encoder_layers_2_")}
    assert network.untrained == last and len(last) == 6
    text = model.encode_text(tokenize(model.tokenizers, ["a red square"]))
    noise = model.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), text, torch.tensor([[64, 64, 0, 0, 64, 64]]))
    noise.square().mean().backward()
    network.unapply()
    without = {m.lora_name for m in network.loras if all(p.grad is None or not p.grad.any() for p in m.parameters())}
    assert without == last
    groups, _ = network.prepare_optimizer_params(None, None, 1e-3)
    in_groups = {id(parameter) for group in groups for parameter in group["params"]}
    learning = [module for module in network.loras if module.lora_name not in last]
    assert in_groups == {id(parameter) for module in learning for parameter in module.parameters()}
    assert in_groups == {id(parameter) for parameter in network.get_trainable_params()}
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert last < {key.partition(".")[0] for key in lora.LoRANetwork.read(tmp_path / "a.safetensors")}
    if kind != "PiSSA":  # which has no norms
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        _, mean, _ = network.apply_max_norm_regularization(1e9)
        norms = [module.product_norm().detach() for module in learning]
        assert float(mean) == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)
        shrunk, _, _ = network.apply_max_norm_regularization(1e-3)
        changed = {name.partition(".")[0] for name, value in network.named_parameters() if not torch.equal(value, before[name])}
        assert changed == {module.lora_name for module in learning} and int(shrunk) == len(learning)
