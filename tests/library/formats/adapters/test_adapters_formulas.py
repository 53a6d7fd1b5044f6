"""Every kind of adapter in float64 against its formula, written out number by number in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from library.formats.adapters.registry import Adapter, find_adapter
from library.formats.low_rank import delta

OUT, IN, RANK = 8, 6, 2
SHAPES = {"linear": (OUT, IN), "conv 1x1": (OUT, IN, 1, 1), "conv 3x3": (OUT, IN, 3, 3)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def weight(request) -> Tensor:
    return numbers(*request.param, seed=99)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(**tensors: Tensor) -> Adapter:
    """From names with _weight for .weight."""
    found = find_adapter("layer", {name.replace("_weight", ".weight"): value for name, value in tensors.items()})
    assert found is not None
    return found


def check(found: Adapter, weight: Tensor, expected: np.ndarray, rtol: float = 1e-12) -> None:
    change = found.weight_change(weight)
    assert change.shape == weight.shape and change.dtype == torch.float64
    np.testing.assert_allclose(change.numpy(), expected.reshape(weight.shape), rtol=rtol, atol=1e-12)
    if not found.needs_weight:  # then the shape alone is enough
        assert torch.equal(found.weight_change(weight.to("meta")), change)
    assert found.weight_change(weight.float()).dtype == torch.float32


def positions(weight: Tensor) -> int:
    return weight[0, 0].numel()


def test_lora(weight):
    up, down = numbers(OUT, RANK), numbers(RANK, *weight.shape[1:], seed=1)
    found = adapter(lora_up_weight=up.view(OUT, RANK, *[1] * (weight.dim() - 2)), lora_down_weight=down, alpha=torch.tensor(3))
    expected = 3 / RANK * np.einsum("or,ri->oi", up.numpy(), down.flatten(1).numpy())
    check(found, weight, expected)
    np.testing.assert_allclose(delta(found.low_rank()).numpy(), expected.reshape(weight.shape), rtol=1e-4, atol=1e-5)


def test_locon_with_tucker_is_a_lora_of_the_same_rank():
    weight = numbers(OUT, IN, 3, 3)
    up, mid, down = numbers(OUT, RANK, 1, 1), numbers(RANK, RANK, 3, 3, seed=1), numbers(RANK, IN, 1, 1, seed=2)
    found = adapter(lora_up_weight=up, lora_mid_weight=mid, lora_down_weight=down, alpha=torch.tensor(1.0))
    expected = np.zeros(weight.shape)
    for a, b in itertools.product(range(RANK), repeat=2):
        expected += np.einsum("o,yx,i->oiyx", up[:, a, 0, 0].numpy(), mid[a, b].numpy(), down[b, :, 0, 0].numpy()) / RANK
    check(found, weight, expected)
    low = found.low_rank()
    assert low.rank == RANK and low.down.shape == (RANK, IN, 3, 3)
    np.testing.assert_allclose(delta(low).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_loha(weight):
    n = IN * positions(weight)
    a1, b1, a2, b2 = numbers(OUT, RANK), numbers(RANK, n, seed=1), numbers(OUT, RANK, seed=2), numbers(RANK, n, seed=3)
    found = adapter(hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, alpha=torch.tensor([5.0]))
    expected = 5 / RANK * np.array([[(a1[o] @ b1[:, i]) * (a2[o] @ b2[:, i]) for i in range(n)] for o in range(OUT)])
    check(found, weight, expected)


def test_loha_with_tucker():
    weight = numbers(OUT, IN, 3, 3)
    cores = [numbers(RANK, RANK, 3, 3, seed=seed) for seed in (1, 2)]
    rows, columns = [numbers(RANK, OUT, seed=seed) for seed in (3, 4)], [numbers(RANK, IN, seed=seed) for seed in (5, 6)]
    named = {"hada_t1": cores[0], "hada_t2": cores[1], "hada_w1_a": rows[0], "hada_w2_a": rows[1]}
    found = adapter(**named, hada_w1_b=columns[0], hada_w2_b=columns[1])
    expected = np.ones(weight.shape)
    for core, row, column in zip(cores, rows, columns, strict=True):
        expected *= np.einsum("abyx,ao,bi->oiyx", core.numpy(), row.numpy(), column.numpy())
    check(found, weight, expected)


@pytest.mark.parametrize("first", ["whole", "pair"])
@pytest.mark.parametrize("second", ["whole", "pair", "pair of kernels", "tucker"])
def test_lokr(weight, first, second):
    if second == "tucker" and weight.dim() == 2:
        weight = numbers(OUT, IN, 3, 3)
    k = positions(weight)
    named = {"alpha": torch.tensor(3.0, dtype=torch.bfloat16)}
    w1, a1, b1 = numbers(2, 3), numbers(2, RANK, seed=1), numbers(RANK, 3, seed=2)
    named |= {"lokr_w1": w1} if first == "whole" else {"lokr_w1_a": a1, "lokr_w1_b": b1}
    w1 = w1 if first == "whole" else a1 @ b1
    if second == "whole":
        named["lokr_w2"] = numbers(4, 2, *weight.shape[2:], seed=3)
        w2 = named["lokr_w2"].reshape(4, 2, k)
    elif second == "tucker":
        named |= {"lokr_t2": numbers(RANK, RANK, *weight.shape[2:], seed=3), "lokr_w2_a": numbers(RANK, 4, seed=4)}
        named["lokr_w2_b"] = numbers(RANK, 2, seed=5)
        core = named["lokr_t2"].flatten(2).numpy()
        w2 = np.einsum("abk,ao,bi->oik", core, named["lokr_w2_a"].numpy(), named["lokr_w2_b"].numpy())
    else:
        named |= {"lokr_w2_a": numbers(4, RANK, seed=4), "lokr_w2_b": numbers(RANK, 2 * k, seed=5)}
        w2 = (named["lokr_w2_a"] @ named["lokr_w2_b"]).reshape(4, 2, k)
        if second == "pair of kernels":
            named["lokr_w2_b"] = named["lokr_w2_b"].view(RANK, 2, *weight.shape[2:])
    scale = 1.0 if first == second == "whole" else 3 / RANK
    expected = np.zeros((OUT, IN, k))
    for a, c, b, d in itertools.product(range(2), range(3), range(4), range(2)):
        expected[a * 4 + b, c * 2 + d] = scale * float(w1[a, c]) * np.asarray(w2[b, d])
    check(adapter(**named), weight, expected)


@pytest.mark.parametrize("early", [False, True], ids=["today", "early LyCORIS"])
def test_glora(weight, early):
    inside = [1] * (weight.dim() - 2)
    a1, a2 = numbers(IN, RANK), numbers(RANK, IN, seed=1)
    b1, b2 = numbers(OUT, RANK, seed=2), numbers(RANK, IN * positions(weight), seed=3)
    pairs = (a2, a1, b2, b1) if early else (a1, a2, b1, b2)
    named = {f"{name}_weight": value for name, value in zip(("a1", "a2", "b1", "b2"), pairs, strict=True)}
    if inside and not early:
        named = {name: value.view(*value.shape, *inside) for name, value in named.items() if name != "b2_weight"}
        named["b2_weight"] = b2.view(RANK, *weight.shape[1:])
    turned = np.moveaxis(np.moveaxis(weight.numpy(), 1, -1) @ (a1 @ a2).numpy(), -1, 1)
    expected = 4 / RANK * (turned + (b1 @ b2).numpy().reshape(weight.shape))
    check(adapter(**named, alpha=torch.tensor(4)), weight, expected)


@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3(weight, on_input):
    factors = numbers(IN if on_input else OUT)
    expected = np.stack([weight[o, i].numpy() * float(factors[i if on_input else o]) for o in range(OUT) for i in range(IN)])
    check(adapter(on_input=torch.tensor(on_input), weight=factors.view(1, -1, *[1] * (weight.dim() - 2))), weight, expected)


def cayley(blocks: np.ndarray, bound: float = 0.0) -> np.ndarray:
    skew = blocks - np.swapaxes(blocks, -1, -2)
    size = np.sqrt((skew**2).sum())
    skew = skew * bound / size if bound and size > bound else skew
    identity = np.eye(blocks.shape[-1])
    return (identity + skew) @ np.linalg.inv(identity - skew)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 50.0])
def test_oft(weight, alpha):
    blocks, rescale = numbers(2, 4, 4), numbers(OUT, *[1] * (weight.dim() - 1), seed=1)
    turns = cayley(blocks.numpy(), alpha * OUT)
    matrix = np.zeros((OUT, OUT))
    matrix[:4, :4], matrix[4:, 4:] = turns[0].T, turns[1].T
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(OUT), atol=1e-12)
    turned = matrix @ weight.flatten(1).numpy()
    found = adapter(oft_blocks=blocks, rescale=rescale, alpha=torch.tensor(alpha, dtype=torch.float64))
    check(found, weight, rescale.flatten(1).numpy() * turned - weight.flatten(1).numpy())
    check(adapter(oft_diag=torch.from_numpy(turns)), weight, turned - weight.flatten(1).numpy())


def test_boft(weight):
    blocks = numbers(2, 2, 4, 4)  # two stages, two blocks of four
    turns = cayley(blocks.numpy())
    product = np.eye(OUT)
    # Which outputs each block turns, in the order of its rows: neighbours in pairs first, then pairs four apart.
    for stage, groups in enumerate([[[0, 2, 1, 3], [4, 6, 5, 7]], [[0, 4, 1, 5], [2, 6, 3, 7]]]):
        matrix = np.zeros((OUT, OUT))
        for turn, group in zip(turns[stage], groups, strict=True):
            matrix[np.ix_(group, group)] = turn
        product = matrix @ product
    np.testing.assert_allclose(product @ product.T, np.eye(OUT), atol=1e-12)
    check(adapter(oft_blocks=blocks), weight, (product - np.eye(OUT)) @ weight.flatten(1).numpy())


def test_full_difference_and_bias(weight):
    diff, diff_b = numbers(*weight.shape, seed=4), numbers(OUT, seed=5)
    found = adapter(diff=diff, diff_b=diff_b)
    check(found, weight, diff.numpy())
    assert torch.equal(found.bias_change(torch.zeros(OUT, dtype=torch.float64)), diff_b)
    only_bias = adapter(diff_b=diff_b)
    assert not only_bias.weight_change(weight).any() and only_bias.bias_change(torch.zeros(OUT)) is not None
    beside = adapter(lora_up_weight=numbers(OUT, 1), lora_down_weight=numbers(1, IN), diff_b=diff_b)
    assert beside.kind.name == "LoRA" and not beside.unknown
    assert torch.equal(beside.bias_change(torch.zeros(OUT, dtype=torch.float64)), diff_b)


@pytest.mark.parametrize("form", ["rows", "columns", "peft", "peft's for a convolution"])
def test_dora(weight, form):
    inside = [1] * (weight.dim() - 2)
    diff, by_rows = numbers(*weight.shape, seed=4), form != "columns"
    magnitude = numbers(OUT if by_rows else IN, seed=5).abs()
    shaped = {"rows": (OUT, 1, *inside), "columns": (1, IN, *inside), "peft": (OUT,)}.get(form, (1, OUT, 1, 1))
    name = "lora_magnitude_vector" if form.startswith("peft") else "dora_scale"
    changed = (weight + diff).flatten(2 if inside else 1).numpy().reshape(OUT, IN, -1)
    expected = np.empty_like(changed)
    for index, m in enumerate(magnitude.tolist()):
        part = (index,) if by_rows else (slice(None), index)
        expected[part] = m * changed[part] / np.sqrt((changed[part] ** 2).sum())
    found = adapter(diff=diff, **{name: magnitude.view(shaped)})
    assert found.title == "full difference with DoRA" and found.low_rank() is None
    check(found, weight, expected - weight.numpy().reshape(OUT, IN, -1))


def test_dora_leaves_a_row_of_zeros():
    weight = torch.zeros(2, 3, dtype=torch.float64)
    change = adapter(diff=torch.tensor([[0.0, 0, 0], [3, 0, 4]]), dora_scale=torch.ones(2, 1)).weight_change(weight)
    assert torch.allclose(change, torch.tensor([[0.0, 0, 0], [0.6, 0, 0.8]], dtype=torch.float64))
