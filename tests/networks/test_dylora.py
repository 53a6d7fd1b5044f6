"""DyLoRA: a step trains one prefix of the ranks, alike everywhere; and what a rank was in training, its extracted file is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from library.formats.low_rank import LowRank, split
from networks import lora
from networks.dylora import DyLoRAModule, create_network, create_network_from_weights, gains

CONV = {"conv_dim": "8", "conv_alpha": "2"}


def make_network(model, dim=8, alpha=4.0, seed=0, **network_args):
    """A DyLoRA of unit 2 whose up weights are not zero, not applied."""
    torch.manual_seed(seed)
    network = create_network(1.0, dim, alpha, None, model.text_encoder, model.unet, **{"unit": "2", **network_args})
    for module in network.loras:
        nn.init.normal_(module.lora_up.weight, std=0.3)
    return network


def outputs(model):
    with torch.no_grad():
        return torch.cat([part.flatten() for part in model.run()])


def split_weights(network, rank):
    """The weights of an extracted file, made by the tools' algebra."""
    state, weights = network.file_weights(), {}
    for module in network.loras:
        name = module.lora_name
        whole = LowRank(state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"], state[f"{name}.alpha"].item())
        part = split(whole, rank)
        weights |= {f"{name}.lora_up.weight": part.up, f"{name}.lora_down.weight": part.down}
        weights[f"{name}.alpha"] = torch.tensor(part.alpha)
    return weights


# ---------------------------------------------------------------- the traps


LAYERS = pytest.mark.parametrize(
    "layer, shape", [(nn.Linear(6, 5), (2, 3, 6)), (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)), (nn.Conv2d(6, 5, 3, 2, 1), (2, 6, 6, 6))]
)


@LAYERS
def test_trap_3_1_the_forward_uses_the_sampled_prefix_alone(layer, shape):
    torch.manual_seed(0)
    module = DyLoRAModule("lora", layer, rank=8, alpha=4.0)
    nn.init.normal_(module.lora_up.weight)
    module.active_rank, x = 2, torch.randn(shape)
    plain = lora.LoRAModule("lora", layer, rank=2, alpha=1.0)  # the same scale, 4 / 8
    plain.lora_up.weight.data = module.lora_up.weight.data[:, :2].clone()
    plain.lora_down.weight.data = module.lora_down.weight.data[:2].clone()
    y = module(x)
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(module.lora_up.weight.grad[:, :2], plain.lora_up.weight.grad)
    torch.testing.assert_close(module.lora_down.weight.grad[:2], plain.lora_down.weight.grad)
    assert not module.lora_up.weight.grad[:, 2:].any() and not module.lora_down.weight.grad[2:].any()


@LAYERS
@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_a_frozen_layer_and_its_module_are_one_function_with_the_gradients_of_the_formula(layer, shape, mode):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).requires_grad_(False)
    bare, module, x = copy.deepcopy(layer), DyLoRAModule("lora", layer, rank=8, alpha=4.0), torch.randn(shape)
    nn.init.normal_(module.lora_up.weight)
    module.gain.copy_(gains(8, 2))
    module.attach(layer)
    for rank, trains in ((2, True), (8, True), (2, False)):
        module.active_rank, results = rank, []
        module.train(trains)
        for formula in (layer, lambda x: bare(x) + module(x)):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                y = formula(leaf * 1.0)
            assert ("Adapted" in type(y.grad_fn).__name__) == (formula is layer)
            results.append((y.float(), *torch.autograd.grad(y.float().square().mean(), [leaf, *module.parameters()])))
        for fast, plain in zip(*results, strict=True):
            assert (fast - plain).norm() < {"float32": 1e-5, "autocast": 0.02}[mode] * plain.norm()
        to_down = results[0][2]
        assert to_down[: rank if trains else 8].any() and not to_down[rank if trains else 8 :].any()


def test_trap_3_2_evaluation_uses_all_ranks_and_is_the_same_every_time(model):
    network = make_network(model, **CONV).eval()
    weights = network.file_weights()
    whole = lora.create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, weights)[0].eval()
    whole.load_state_dict(weights)
    whole.apply_to(model.text_encoder, model.unet)
    expected = outputs(model)
    whole.unapply()
    network.apply_to(model.text_encoder, model.unet)
    for _ in range(4):
        network.on_step_start()
        torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-4)
    first = outputs(model)
    network.on_step_start()
    assert torch.equal(outputs(model), first)
    network.train().use_rank(2)
    assert not torch.equal(outputs(model), expected)


def test_trap_3_3_one_draw_a_step_for_all_modules_and_each_rank_as_often_as_any(model):
    network = make_network(model, **CONV)
    torch.manual_seed(3)
    seen = []
    for _ in range(400):
        network.on_step_start(model.text_encoder, model.unet)
        ranks = {module.active_rank for module in network.loras}
        assert len(ranks) == 1
        seen += ranks
    counts = [seen.count(rank) for rank in (2, 4, 6, 8)]
    assert sum(counts) == 400 and min(counts) > 70
    torch.manual_seed(3)
    network.on_step_start()
    assert network.loras[0].active_rank == seen[0]  # from torch's generator, which the trainer seeds for every step


def test_trap_3_3_gradient_checkpointing_computes_with_the_same_rank_again(model):
    network = make_network(model, **CONV)
    network.apply_to(model.text_encoder, model.unet)
    network.train().use_rank(4)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.unet.train()
        network.zero_grad()
        model.run()[1].square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    assert not any(module.lora_down.weight.grad[4:].any() for module in network.loras)


@pytest.mark.parametrize("rank", [2, 4, 6, 8])
@pytest.mark.parametrize("fixture", ["model", "linear_model"])
def test_trap_3_4_an_extracted_rank_does_what_it_did_in_training(fixture, rank, request):
    model = request.getfixturevalue(fixture)
    network = make_network(model, **CONV).train()
    base = outputs(model)
    network.use_rank(rank)
    network.apply_to(model.text_encoder, model.unet)
    in_training = outputs(model) - base
    network.unapply()
    weights = split_weights(network, rank)
    extracted, _ = lora.create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, weights)
    extracted.eval().load_state_dict(weights)
    extracted.apply_to(model.text_encoder, model.unet)
    assert in_training.abs().max() > 0.05
    torch.testing.assert_close(outputs(model) - base, in_training, atol=2e-6, rtol=1e-5)


def test_trap_3_5_conv_alpha_and_the_multiplier_are_honoured(model):
    torch.manual_seed(0)
    network = make_network(model, **CONV)
    scales = {(module.lora_down.weight[0, 0].numel() > 1, module.scale) for module in network.loras}
    assert scales == {(False, 0.5), (True, 0.25)}
    module, x = network.parts["lora_unet"][0], torch.randn(2, 16, 3, 3)
    network.train().use_rank(4)
    once = module(x)
    network.set_multiplier(0.5)
    torch.testing.assert_close(module(x), once / 2)


def test_trap_3_5_a_reloaded_dylora_has_its_unit(model, tmp_path):
    network = make_network(model)
    file, words = tmp_path / "a.safetensors", {"unit": "2"}
    network.save_weights(file, None, {"ss_network_args": json.dumps(words)})
    parts = (None, model.text_encoder, model.unet)
    loaded, weights = create_network_from_weights(1.0, file, *parts)
    assert (loaded.unit, loaded.rank) == (2, 8) and list(weights)
    assert create_network_from_weights(1.0, file, *parts, unit="4")[0].unit == 4
    network.save_weights(tmp_path / "bare.safetensors", None, None)
    assert create_network_from_weights(1.0, tmp_path / "bare.safetensors", *parts)[0].unit == 1
    assert create_network_from_weights(1.0, None, *parts, weights)[0].unit == 1


def test_trap_3_6_a_dylora_is_mergeable_and_merged_is_applied(model):
    network = make_network(model, **CONV).eval()
    assert network.is_mergeable()
    base = outputs(model)
    network.apply_to(model.text_encoder, model.unet)
    applied = outputs(model) - base
    network.unapply()
    network.merge_to(model.text_encoder, model.unet, network.file_weights())
    torch.testing.assert_close(outputs(model) - base, applied, atol=2e-5, rtol=1e-3)


# ---------------------------------------------------------------- files and words


def test_the_file_is_an_ordinary_lora(model):
    network = make_network(model, **CONV)
    plain = lora.create_network(1.0, 8, 4.0, None, model.text_encoder, model.unet, **CONV)
    assert {k: t.shape for k, t in network.file_weights().items()} == {k: t.shape for k, t in plain.state_dict().items()}
    assert {k: t for k, t in network.file_weights().items() if k.endswith("alpha")} == {
        k: t for k, t in plain.state_dict().items() if k.endswith("alpha")
    }


def test_the_gain_makes_up_for_the_steps_that_a_rank_misses(model, tmp_path):
    network = make_network(model, **CONV)
    shares = torch.tensor([1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])
    assert all(torch.allclose(module.gain, (2 / shares).sqrt()) for module in network.loras)
    assert torch.equal(gains(8, 8), torch.ones(8))  # a LoRA
    parts = (None, model.text_encoder, model.unet)

    again = create_network(1.0, 8, 4.0, *parts, unit="2", **CONV)
    again.load_state_dict(network.state_dict())  # as a resumed run does: bit for bit
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True))

    network.save_weights(tmp_path / "a.safetensors", None, None)
    for unit in ("2", "4"):  # the product is the file's, whatever the unit
        other = create_network(1.0, 8, 4.0, *parts, unit=unit, **CONV)
        other.load_weights(tmp_path / "a.safetensors")
        torch.testing.assert_close(other.file_weights(), network.file_weights())


def test_scale_weight_norms_counts_the_gain(model):
    network = make_network(model, **CONV)
    network.apply_max_norm_regularization(0.5)
    for module in network.loras:
        weights = module.file_weights()
        norm = lora.weight_delta(weights["lora_up.weight"], weights["lora_down.weight"], weights["alpha"].item()).norm()
        assert norm < 0.5001


def test_the_commands_of_the_document(model):
    parts = (None, model.text_encoder, model.unet)
    network = create_network(1.0, 16, 1.0, *parts, unit="4")
    assert (network.rank, network.unit) == (16, 4)
    network = create_network(1.0, 32, 16.0, *parts, conv_dim="32", conv_alpha="16", unit="8")
    assert {(m.rank, m.scale) for m in network.loras} == {(32, 0.5)} and network.unit == 8
    assert create_network(1.0, None, None, *parts).unit == 1


@pytest.mark.parametrize(
    "dim, words, message",
    [
        (16, {"unit": "3"}, "unit=3 does not divide the rank 16; give one of 1, 2, 4, 8, 16"),
        (16, {"unit": "0"}, "unit=0 does not divide the rank 16"),
        (16, {"unit": "x"}, "network_args unit=x: 'x' is not a whole number"),
        (16, {"conv_dim": "8"}, "conv_dim=8: a DyLoRA has one rank, give conv_dim=16"),
        (16, {"conv_alpha": "8"}, "conv_alpha does nothing alone"),
        (16, {"uint": "4"}, "unknown network_args key 'uint'; did you mean 'unit'"),
        (16, {"block_dims": "4"}, "network_args block_dims: a DyLoRA has no such thing; .* --network_module=networks.lora"),
        (16, {"down_lr_weight": "sine"}, "network_args down_lr_weight: a DyLoRA has no such thing"),
        (16, {"rank_dropout": "0.1"}, "network_args rank_dropout: a DyLoRA has no such thing"),
        (16, {"neuron_dropout": 0.1}, "--network_dropout: a DyLoRA has no such thing"),
    ],
)
def test_wrong_words_are_errors_of_one_line(model, dim, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_network(1.0, dim, 1.0, None, model.text_encoder, model.unet, **words)
    assert "\n" not in str(caught.value)


def test_loraplus_and_weights_of_several_ranks(model):
    network = make_network(model, loraplus_lr_ratio="4")
    assert network.prepare_optimizer_params(None, None, 1e-3)[1][-1] == "unet plus"
    block_dims = ",".join(["4"] * 12 + ["2"] * 13)
    other = lora.create_network(1.0, 4, 1, None, model.text_encoder, model.unet, block_dims=block_dims)
    with pytest.raises(ValueError, match="a DyLoRA has one rank, these weights have 2, 4"):
        create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, other.state_dict())


# ---------------------------------------------------------------- the extraction tool


@pytest.mark.parametrize(
    "metadata", [None, {"ss_network_args": '{"unit": "2"}', "ss_network_dim": "8", "ss_network_module": "networks.dylora"}]
)
def test_trap_3_4_and_1_14_the_split_files_do_what_the_ranks_did_in_training(model, tmp_path, metadata):
    from networks.extract_lora_from_dylora import main

    network = make_network(model, **CONV).train()
    network.save_weights(tmp_path / "m.safetensors", None, metadata)
    words = ["--model", str(tmp_path / "m.safetensors"), "--save_to", str(tmp_path / "split.safetensors")]
    main(words + ([] if metadata else ["--unit", "2"]))  # the unit is in the metadata
    files = sorted(tmp_path.glob("split-*.safetensors"))
    assert [file.name for file in files] == [f"split-{rank:04}.safetensors" for rank in (2, 4, 6, 8)]
    base = outputs(model)
    for file, rank in zip(files, (2, 4, 6, 8), strict=True):
        network.use_rank(rank)
        network.apply_to(model.text_encoder, model.unet)
        in_training = outputs(model) - base
        network.unapply()
        extracted, weights = lora.create_network_from_weights(1.0, file, None, model.text_encoder, model.unet)
        extracted.eval().load_state_dict(weights)
        assert {module.rank for module in extracted.loras} == {rank} and len(extracted.loras) == len(network.loras)
        extracted.apply_to(model.text_encoder, model.unet)
        torch.testing.assert_close(outputs(model) - base, in_training, atol=3e-6, rtol=1e-4)
        extracted.unapply()
