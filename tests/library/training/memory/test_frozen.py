"""Frozen layers: the results and gradients of torch's own, by either way, with nothing kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.testing import small_stable_diffusion
from library.training.memory.frozen import FEW_POSITIONS, FEW_POSITIONS_OF_LARGE, LARGE, FrozenConv2d, FrozenLinear, freeze_layers

LAYERS = [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, bias=False),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False), nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 6, 5), (2, 4, 5, 4), (2, 4, 9, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_torchs_own_and_nothing_is_kept(layer, shape, dtype):
    torch.manual_seed(0)
    plain = copy.deepcopy(layer).requires_grad_(False).to(dtype)
    frozen = copy.deepcopy(plain)
    freeze_layers(frozen)
    assert type(frozen) is FrozenConv2d
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = frozen(x)
    assert not kept and y.is_contiguous() and not y._is_view()
    near = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    )  # in 16 bits it is the same operation
    torch.testing.assert_close(y, plain(x), **near)
    direction = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(module(x), x, direction)[0] for module in (frozen, plain))
    torch.testing.assert_close(ours, theirs, **near)
    with torch.no_grad():
        assert torch.equal(frozen(x), y)


@pytest.mark.parametrize("channels, shape, by_product", [
    ((4, 6), (1, 4, 8, 8), True), ((4, 6), (4, 4, 4, 4), True), ((4, 6), (1, 4, 8, 9), False), ((4, 6), (2, 4, 8, 8), False),
    ((1024, 911), (1, 1024, 16, 16), True), ((1024, 911), (4, 1024, 8, 8), True), ((1024, 911), (1, 1024, 16, 17), False),
    ((1024, 910), (1, 1024, 16, 16), False),
])  # fmt: skip
def test_few_positions_of_the_whole_batch_are_a_product(monkeypatch, channels, shape, by_product):
    """At most 64; with a weight of 2**23 numbers, which 9 x 1024 x 911 is the first to have, 256."""
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, 3, padding=1, device="meta").to_empty(device="cpu").requires_grad_(False)
    freeze_layers(layer)
    assert (FEW_POSITIONS, FEW_POSITIONS_OF_LARGE, LARGE) == (64, 256, 2**23)
    calls = []
    unfold = torch.nn.functional.unfold
    monkeypatch.setattr(torch.nn.functional, "unfold", lambda *args, **kwargs: calls.append(1) or unfold(*args, **kwargs))
    layer(torch.randn(shape))
    assert bool(calls) == by_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_have_torchs_results_and_gradients_and_keep_nothing(by_onednn, dtype, bias):
    torch.manual_seed(0)
    plain = nn.Linear(6, 5, bias).requires_grad_(False).to(dtype)
    frozen = copy.deepcopy(plain)
    freeze_layers(frozen)
    assert type(frozen) is (FrozenLinear if by_onednn and dtype == torch.float32 else nn.Linear)
    x = torch.randn(2, 7, 6, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y, direction = frozen(x), torch.randn(2, 7, 5, dtype=dtype)
    assert type(frozen) is nn.Linear or (not kept and not y._is_view())  # torch's own keeps its weight
    torch.testing.assert_close(y, plain(x))
    ours, theirs = (torch.autograd.grad(module(x), x, direction)[0] for module in (frozen, plain))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(frozen(x), y)


def test_a_whole_unet_computes_the_same_and_layers_that_learn_are_left_alone(by_onednn):
    torch.manual_seed(0)
    unet = small_stable_diffusion().denoiser.requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    twin = copy.deepcopy(unet)
    freeze_layers(twin)
    assert type(twin.conv_in) is nn.Conv2d and type(twin.conv_out) is FrozenConv2d
    twin.conv_in.requires_grad_(False)
    freeze_layers(twin)
    assert type(twin.conv_in) is FrozenConv2d
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    context = torch.randn(2, 77, unet.config.cross_attention_dim)
    found = []
    for model in (unet, twin):
        y = model(x, torch.tensor([10, 700]), context).sample
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.Linear(4, 4)])
@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_layers_that_learn_in_part_are_left_alone(by_onednn, layer, learns):
    layer = copy.deepcopy(layer).requires_grad_(False)
    getattr(layer, learns).requires_grad_(True)
    freeze_layers(layer)
    assert type(layer) in (nn.Conv2d, nn.Linear)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding="same")])
def test_unusual_padding_is_left_to_torch(layer):
    freeze_layers(layer.requires_grad_(False))
    assert type(layer) is nn.Conv2d
