"""The LoRA maths against float64 numpy, and what a network does to a model: apply, merge, stack, un-apply, train."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from networks.lora import LoRAModule, create_network, create_network_from_weights
from networks.suite_module import SuiteModule

CONV = {"conv_dim": "2", "conv_alpha": "3"}


def make_network(model, dim=4, alpha=2.0, seed=0, **network_args):
    """A network whose up weights are not zero, in eval mode, not applied."""
    torch.manual_seed(seed)
    network = create_network(1.0, dim, alpha, None, model.text_encoder, model.unet, **network_args).eval()
    for module in network.loras:
        nn.init.normal_(module.lora_up.weight, std=0.3)
    return network


def outputs(model):
    with torch.no_grad():
        return torch.cat([part.flatten() for part in model.run()])


def effect(model, *networks):
    """The change of the outputs that these networks cause."""
    base = outputs(model)
    for network in networks:
        network.apply_to(model.text_encoder, model.unet)
    changed = outputs(model)
    for network in networks:
        network.unapply()
    return changed - base


def numpy_conv(x, weight, stride, padding):
    """Plain convolution in float64: x (B, I, H, W), weight (O, I, k, k)."""
    k = weight.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bihwyx,oiyx->bohw", windows, weight)


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.Linear(6, 5), (2, 6)),
        (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
        (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 5, 4)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 6, 6)),
    ],
)
@pytest.mark.parametrize("kind", [LoRAModule, SuiteModule])
def test_forward_is_the_formula_in_float64(kind, layer, shape):
    """y = W x + multiplier * alpha / rank * up(down(x))"""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    module = kind("lora", layer, rank=3, alpha=2.0, multiplier=0.7)
    nn.init.normal_(module.lora_up.weight)
    module.attach(layer)
    x = torch.randn(shape)
    weight, bias, up, down = (
        t.detach().double().numpy() for t in (layer.weight, layer.bias, module.lora_up.weight, module.lora_down.weight)
    )
    x64 = x.double().numpy()
    if isinstance(layer, nn.Linear):
        expected = x64 @ weight.T + bias + 0.7 * 2 / 3 * (x64 @ down.T @ up.T)
    else:
        full = np.einsum("ok,kiyx->oiyx", up[:, :, 0, 0], down)
        expected = numpy_conv(x64, weight + 0.7 * 2 / 3 * full, layer.stride[0], layer.padding[0]) + bias[:, None, None]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer, fan_in", [(nn.Linear(300, 5), 300), (nn.Conv2d(40, 5, 3), 360), (nn.Conv2d(400, 5, 1), 400)])
def test_down_starts_uniform_within_one_over_root_fan_in_and_up_at_zero(layer, fan_in):
    torch.manual_seed(0)
    module = LoRAModule("lora", layer, rank=64, alpha=1)
    down, bound = module.lora_down.weight.detach(), 1 / math.sqrt(fan_in)
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert abs(down.mean().item()) < 0.02 * bound
    assert not module.lora_up.weight.any()


@pytest.mark.parametrize("alpha, scale", [(1, 0.125), (8, 1.0), (0, 1.0), (None, 1.0), (0.5, 0.0625)])
def test_scale_is_alpha_over_rank_and_alpha_zero_or_none_means_rank(alpha, scale):
    module = LoRAModule("lora", nn.Linear(4, 4), rank=8, alpha=alpha)
    assert module.scale == scale
    assert module.alpha.item() == scale * 8


@pytest.mark.parametrize("kind", [LoRAModule, SuiteModule])
@pytest.mark.parametrize("model_dtype, lora_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_types_may_differ_without_autocast(kind, model_dtype, lora_dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(2, 3, 8)
    module = kind("lora", layer, rank=4, alpha=4)
    nn.init.normal_(module.lora_up.weight)
    expected = layer(x) + module(x)
    layer.to(model_dtype)
    module.to(lora_dtype).attach(layer)
    y = layer(x.to(model_dtype))
    assert y.dtype == model_dtype
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)


# ---------------------------------------------------------------- a whole model


def test_the_start_is_the_base_model_bit_for_bit(model):
    base = outputs(model)
    network = create_network(1.0, 4, 1, None, model.text_encoder, model.unet, **CONV)
    network.apply_to(model.text_encoder, model.unet)
    assert torch.equal(outputs(model), base)
    network.train()
    assert torch.equal(outputs(model), base)


def test_every_module_takes_part(model):
    """Each single module gets a gradient: none is left unattached."""
    network = make_network(model, **CONV)
    network.apply_to(model.text_encoder, model.unet)
    network.requires_grad_(True)
    context, noise = model.run()
    (context.sum() + noise.square().sum()).backward()
    gradients = torch.stack([module.lora_down.weight.grad.abs().max() for module in network.loras])
    assert gradients.min() > 1e-6 * gradients.median()  # more than rounding


@pytest.mark.parametrize("fixture", ["model", "linear_model"])
@pytest.mark.parametrize("network_args", [{}, CONV])
@pytest.mark.parametrize("multiplier", [1.0, -0.6])
def test_applied_equals_merged_to_rounding(fixture, network_args, multiplier, request):
    model = request.getfixturevalue(fixture)
    network = make_network(model, **network_args)
    network.set_multiplier(multiplier)
    base = outputs(model)
    applied = effect(model, network)
    network.merge_to(model.text_encoder, model.unet, network.state_dict())
    merged = outputs(model) - base
    assert applied.abs().max() > 0.1
    torch.testing.assert_close(merged, applied, atol=2e-5, rtol=1e-3)


def test_trap_2_8_merge_to_works_with_three_and_with_five_arguments(model, linear_model):
    network = make_network(model)
    weights = network.state_dict()
    before = model.weights()
    loaded, weights = create_network_from_weights(0.5, None, None, model.text_encoder, model.unet, weights)
    loaded.merge_to(model.text_encoder, model.unet, weights)
    after = model.weights()
    assert [w.dtype for w in after] == [w.dtype for w in before]
    changed = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed == len(network.loras)
    linear_network = make_network(linear_model)
    linear_network.merge_to(linear_model.text_encoder, linear_model.unet, linear_network.state_dict(), torch.bfloat16, "cpu")
    weight = linear_model.unet.mid_block.attentions[0].proj_in.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())


def test_merge_changes_only_the_parts_in_the_weights(model):
    weights = {key: t for key, t in make_network(model).state_dict().items() if key.startswith("lora_te_")}
    unet_before = [p.clone() for p in model.unet.parameters()]
    network, _ = create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, weights)
    assert list(network.parts) == ["lora_te"]
    network.merge_to(model.text_encoder, model.unet, weights)
    assert all(torch.equal(a, b) for a, b in zip(unet_before, model.unet.parameters(), strict=True))


def test_unapply_restores_the_model_bit_for_bit_in_any_order(model):
    base, weights = outputs(model), model.weights()
    modules = {name: dict(vars(module)) for name, module in model.unet.named_modules()}
    first, second = make_network(model, seed=1, **CONV), make_network(model, seed=2)
    first.apply_to(model.text_encoder, model.unet)
    second.apply_to(model.text_encoder, model.unet)
    assert not torch.equal(outputs(model), base)
    first.unapply()
    second_alone = outputs(model)
    second.unapply()
    assert torch.equal(outputs(model), base)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.weights(), strict=True))
    assert {name: set(vars(module)) for name, module in model.unet.named_modules()} == {n: set(v) for n, v in modules.items()}
    second.apply_to(model.text_encoder, model.unet)
    assert torch.equal(outputs(model), second_alone)
    second.apply_to(model.text_encoder, model.unet)  # a second time is not twice the strength
    assert torch.equal(outputs(model), second_alone)


def test_three_networks_add_up(model):
    """Stacked = the model with the sum of the three deltas merged into it."""
    networks = [make_network(model, seed=i, dim=2 + i) for i in range(3)]
    for network, multiplier in zip(networks, (1.0, 0.5, -0.8), strict=True):
        network.set_multiplier(multiplier)
    base = outputs(model)
    stacked = effect(model, *networks)
    for network in networks:
        network.merge_to(model.text_encoder, model.unet, network.state_dict())
    torch.testing.assert_close(outputs(model) - base, stacked, atol=2e-5, rtol=1e-3)


def test_multiplier_zero_and_disabled_are_the_base_model(model):
    base = outputs(model)
    network = make_network(model)
    network.apply_to(model.text_encoder, model.unet)
    network.set_multiplier(0.0)
    assert torch.equal(outputs(model), base)
    network.set_multiplier(1.0)
    network.set_enabled(False)
    assert torch.equal(outputs(model), base)
    network.set_enabled(True)
    assert not torch.equal(outputs(model), base)


def test_the_networks_state_holds_its_own_tensors_only(model):
    network = make_network(model)
    keys = list(network.state_dict())
    network.apply_to(model.text_encoder, model.unet)
    assert list(network.state_dict()) == keys
    assert {key.split(".", 1)[1] for key in keys} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert not any("lora" in key for key in model.unet.state_dict())


@pytest.mark.parametrize("apply_text_encoder, apply_unet, prefix", [(True, False, "lora_te_"), (False, True, "lora_unet_")])
def test_a_part_not_applied_is_neither_trained_nor_saved(model, apply_text_encoder, apply_unet, prefix):
    network = make_network(model)
    network.apply_to(model.text_encoder, model.unet, apply_text_encoder, apply_unet)
    assert all(key.startswith(prefix) for key in network.state_dict())
    groups, names = network.prepare_optimizer_params(None, None, 1e-3)
    assert names == (["textencoder"] if apply_text_encoder else ["unet"])
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


def test_trap_2_1_networks_are_independent_of_those_made_before(model):
    alone = len(make_network(model).loras)
    with_convolutions = make_network(model, **CONV)
    create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, with_convolutions.state_dict())
    assert len(with_convolutions.loras) > alone
    assert len(make_network(model).loras) == alone


def test_a_model_without_target_layers_is_an_error():
    with pytest.raises(ValueError, match="no layer for a LoRA was found"):
        create_network(1.0, 4, 1, None, nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_applying_to_another_model_is_an_error(model):
    network = make_network(model)
    with pytest.raises(ValueError, match="no layer for the LoRA module lora_te_"):
        network.apply_to(None, model.unet)


# ---------------------------------------------------------------- training


def test_optimizer_groups(model):
    network = make_network(model)
    groups, names = network.prepare_optimizer_params(1e-5, 2e-4, 1e-3)
    assert names == ["textencoder", "unet"]
    assert [g["lr"] for g in groups] == [1e-5, 2e-4]
    assert [len(g["params"]) for g in groups] == [2 * len(network.parts["lora_te"]), 2 * len(network.parts["lora_unet"])]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in network.get_trainable_params()}
    assert [g["lr"] for g in network.prepare_optimizer_params(None, None, 1e-3)[0]] == [1e-3, 1e-3]


def test_a_part_with_learning_rate_zero_is_left_out_and_still_saved(model, caplog):
    network = make_network(model)
    groups, names = network.prepare_optimizer_params(0.0, None, 1e-3)
    assert names == ["unet"] and "textencoder: learning rate 0" in caplog.text
    assert any(key.startswith("lora_te_") for key in network.state_dict())
    with pytest.raises(ValueError, match="nothing to train"):
        network.prepare_optimizer_params(0.0, 0.0, 1e-3)


def test_training_moves_the_network_and_never_the_model(model):
    network = create_network(1.0, 4, 4, None, model.text_encoder, model.unet)
    network.apply_to(model.text_encoder, model.unet)
    network.prepare_grad_etc(model.text_encoder, model.unet)
    network.enable_gradient_checkpointing()
    network.on_epoch_start(model.text_encoder, model.unet)
    weights = model.weights()
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, None, 1e-2)[0])
    losses = []
    for _ in range(5):
        loss = model.run()[1].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.weights(), strict=True))


def test_gradients_with_the_models_gradient_checkpointing_are_the_same(model):
    network = make_network(model, rank_dropout="0.3", module_dropout="0.3", dropout="0.1", **CONV)
    network.apply_to(model.text_encoder, model.unet)
    network.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.text_encoder.gradient_checkpointing_enable()
            model.text_encoder.train()
        network.zero_grad(set_to_none=False)
        torch.manual_seed(5)
        model.run()[1].square().sum().backward()
        gradients.append([p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in network.parameters()])
    assert sum(g.any().item() for g in gradients[0]) > len(network.loras)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_max_norm_scales_both_factors_by_the_root_of_the_ratio(model):
    network = make_network(model, **CONV)
    before = {k: t.clone() for k, t in network.state_dict().items()}
    norms = []
    for module in network.loras:
        up, down = module.lora_up.weight.detach().double(), module.lora_down.weight.detach().double()
        norms.append((module.scale * up.flatten(1) @ down.flatten(1)).norm())
    below, above = torch.stack(norms).sort().values[len(norms) // 2 - 1 :][:2].tolist()
    assert above > below * 1.0001
    limit = (below + above) / 2  # no module's own norm, which rounding would put on either side
    shrunk, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert int(shrunk) == sum(n > limit for n in norms)
    assert float(largest) == pytest.approx(limit, rel=1e-5) and float(mean) < limit
    after = network.state_dict()
    for module, norm in zip(network.loras, norms, strict=True):
        ratio = min(1.0, limit / norm.item())
        for part in ("lora_up.weight", "lora_down.weight"):
            key = f"{module.lora_name}.{part}"
            torch.testing.assert_close(after[key], before[key] * math.sqrt(ratio))
