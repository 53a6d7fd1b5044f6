"""What the suite's module adds to a LoRA: one function with its frozen layer, and dropouts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.fused import FEW_RANKS
from networks.suite_module import SuiteModule

# ---------------------------------------------------------------- one function with the layer


def is_one_function(y: torch.Tensor) -> bool:
    """Whether a layer and its LoRA were computed as one."""
    return type(y.grad_fn).__name__ in ("_AdaptedLinearBackward", "_AdaptedConvBackward")


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(6, 5), (2, 3, 6)), (nn.Linear(6, 5), (2, 6)), (nn.Linear(6, 5), (6,)), (nn.Linear(6, 5, bias=False), (4, 2, 3, 6)),
    (nn.Conv2d(6, 5, 1), (3, 6, 4, 2)), (nn.Conv2d(6, 5, 1, bias=False), (1, 6, 3, 3)),
    (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 5, 4)), (nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), (2, 6, 5, 8)),
    (nn.Conv2d(6, 5, 1, stride=2), (2, 6, 4, 4)), (nn.Conv2d(6, 5, (1, 5), padding=(0, 4), dilation=(3, 2)), (1, 6, 7, 9)),
])  # fmt: skip
@pytest.mark.parametrize("network_dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_attached_layer_has_the_losses_and_gradients_of_the_plain_formula(layer, shape, network_dropout, mode, by_onednn):
    """What `attach` computes beside base + module(x), without dropout and with the same draws of it."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).requires_grad_(False)
    rank_dropout = network_dropout if len(shape) > 1 else 0.0  # is by samples, and there is none
    module = SuiteModule("lora", layer, rank=3, alpha=2.0, multiplier=0.7, dropout=network_dropout, rank_dropout=rank_dropout)
    nn.init.normal_(module.lora_up.weight)
    bare, x = copy.deepcopy(layer), torch.randn(shape)
    module.attach(layer)
    results = []
    for formula in (layer, lambda x: bare(x) + module(x)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            y = formula(leaf * 1.0)
        assert y.dtype == {"float32": torch.float32, "autocast": torch.bfloat16}[mode]
        assert is_one_function(y) == (formula is layer and not network_dropout)
        loss = y.float().square().mean()
        results.append((y.float(), loss, *torch.autograd.grad(loss, [leaf, *module.parameters()])))
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).norm() < {"float32": 1e-5, "autocast": 0.02}[mode] * plain.norm()


class Half(nn.Linear):
    """A layer of a class of its own, which does more than multiply by its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def attached(layer: nn.Module, count: int = 1, rank: int = 2) -> list[SuiteModule]:
    """LoRA modules with random weights, attached to a layer."""
    modules = [SuiteModule(f"lora{index}", layer, rank, 2) for index in range(count)]
    for module in modules:
        nn.init.normal_(module.lora_up.weight)
        module.attach(layer)
    return modules


@pytest.mark.parametrize(
    "kind",
    [
        "two networks", "learns", "parametrized", "replaced", "own class", "channels last", "hook inside", "no middle",
        "cut off", "groups", "rings", "many ranks",
    ],
)  # fmt: skip
def test_layer_and_lora_are_one_function_only_where_that_is_the_formula(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    convolutions = {
        "no middle": {"kernel_size": 2}, "cut off": {"kernel_size": 3}, "groups": {"kernel_size": 1, "groups": 2},
        "rings": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, "many ranks": {"kernel_size": 3, "padding": 1},
    }  # fmt: skip
    if kind in convolutions:
        layer, x = nn.Conv2d(8, 8, **convolutions[kind]), torch.randn(2, 8, 3, 4)
    if kind == "channels last":
        layer, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    if kind == "own class":
        layer = Half(8, 8)
    layer.requires_grad_(kind == "learns")
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(layer).requires_grad_(True)
    if kind == "replaced":
        layer.forward = lambda x: x * 3
    bare = copy.deepcopy(layer)
    modules = attached(layer, 2 if kind == "two networks" else 1, rank=FEW_RANKS + 1 if kind == "many ranks" else 2)
    if kind == "hook inside":
        modules[0].lora_down.register_forward_hook(lambda module, inputs, hidden: hidden * 2)
    results = []
    for formula in (layer, lambda x: bare(x) + sum(module(x) for module in modules)):
        leaf = x.clone().requires_grad_()
        y = formula(leaf)
        assert not is_one_function(y)
        weights = [parameter for module in modules for parameter in module.parameters()]
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *weights])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_one_function_gives_what_may_be_changed_in_place_and_takes_an_empty_batch(by_onednn):
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(8, 8), torch.randn(3, 8)), (nn.Conv2d(8, 8, 1), torch.randn(2, 8, 3, 4))):
        attached(layer.requires_grad_(False))
        y = layer(x.requires_grad_())
        assert is_one_function(y)
        y.mul_(2).sum().backward()
        assert x.grad.any() and layer(x[:0]).shape == (0, *y.shape[1:])


def test_hook_on_a_module_sees_what_it_adds():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    module = SuiteModule("lora", layer, rank=3, alpha=2.0)
    nn.init.normal_(module.lora_up.weight)
    x = torch.randn(2, 6)
    bare = layer(x)
    module.attach(layer)
    module.register_forward_hook(lambda module, inputs, added: torch.zeros_like(added))  # as regions of an image do
    assert torch.equal(layer(x), bare)


def one_layer(shape=(4000, 1, 8), **dropouts):
    torch.manual_seed(0)
    conv = len(shape) == 4
    layer = nn.Conv2d(8, 8, 1) if conv else nn.Linear(8, 8)
    module = SuiteModule("lora", layer, rank=4, alpha=4, **dropouts)
    nn.init.normal_(module.lora_up.weight)
    return layer, module, torch.randn(1, *shape[1:]).expand(shape)


def test_autocast_computes_in_its_type_and_trains_float32_weights():
    layer, module, x = one_layer((2, 3, 8))
    layer.to(torch.bfloat16).requires_grad_(False)
    module.attach(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    hidden = y.grad_fn.saved_tensors[-1]
    y.float().sum().backward()
    assert (y.dtype, hidden.dtype) == (torch.bfloat16, torch.bfloat16)
    assert module.lora_down.weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- dropouts


@pytest.mark.parametrize("shape", [(4000, 1, 8), (4000, 8), (4000, 8, 1, 1)])
@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_dropout_keeps_the_mean_and_is_off_in_eval(kind, shape):
    _, module, x = one_layer(shape, **{kind: 0.4})
    module.eval()
    exact = module(x)
    assert torch.equal(module(x), exact)
    module.train()
    dropped = module(x)
    assert not torch.allclose(dropped, exact)
    torch.testing.assert_close(dropped.mean(0), exact.mean(0), atol=0.15, rtol=0)


def test_neuron_dropout_zeroes_single_values_and_rank_dropout_whole_ranks_of_a_sample():
    shape = (200, 6, 8)
    for kind, whole_ranks in (("dropout", False), ("rank_dropout", True)):
        _, module, x = one_layer(shape, **{kind: 0.5})
        module.lora_up = nn.Identity()  # the output is then the hidden value of each rank
        zero = module(x) == 0
        assert zero.float().mean().item() == pytest.approx(0.5, abs=0.05)
        per_sample_and_rank = zero.float().mean(1)
        assert bool(((per_sample_and_rank == 0) | (per_sample_and_rank == 1)).all()) is whole_ranks
        kept = module(x)
        module.eval()
        torch.testing.assert_close(kept[kept != 0], (2 * module(x))[kept != 0])  # scaled by 1 / (1 - 0.5)


def test_module_dropout_skips_the_whole_module_without_rescaling():
    layer, module, x = one_layer((2, 1, 8), module_dropout=0.3)
    base, full = layer(x), layer(x) + module(x)
    module.attach(layer)
    skipped = 0
    for _ in range(500):
        y = layer(x)
        skipped += torch.equal(y, base)
        assert torch.equal(y, base) or torch.equal(y, full)
    assert skipped / 500 == pytest.approx(0.3, abs=0.06)
    module.eval()
    assert all(torch.equal(layer(x), full) for _ in range(20))


def test_dropouts_are_the_same_when_gradient_checkpointing_computes_again():
    from torch.utils.checkpoint import checkpoint

    layer, module, x = one_layer((8, 3, 8), dropout=0.3, rank_dropout=0.3, module_dropout=0.5)
    layer.requires_grad_(False)
    module.attach(layer)
    for seed in range(6):
        gradients = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            torch.manual_seed(seed)
            module.zero_grad()
            y = run(x.clone().requires_grad_())
            (y**2).sum().backward()
            gradients.append(module.lora_up.weight.grad)
        assert (gradients[0] is None) == (gradients[1] is None)
        assert gradients[0] is None or torch.equal(*gradients)
