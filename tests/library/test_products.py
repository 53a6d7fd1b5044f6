"""Products of matrices: either library's beside float64, and which of them is taken."""

from __future__ import annotations

import pytest
import torch

from library import products
from library.products import for_each, linear, onednn_is_faster, summed, with_few, with_transposed

has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def near(found, reference):
    assert found.dtype == torch.float32 and found.shape == reference.shape
    assert (found.double() - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (2, 7, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layers_product_is_that_of_float64(by_onednn, shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(10, 24)
    bias = torch.randn(10) if with_bias else None
    assert products.by_onednn(weight) == by_onednn
    product = linear(x, weight, bias)
    assert not (by_onednn and product._is_view())
    near(product, x.double() @ weight.double().T + (bias.double() if with_bias else 0))


def test_factors_may_lie_in_any_order(by_onednn):
    torch.manual_seed(0)
    weight, gradient, columns = torch.randn(10, 24), torch.randn(3, 7, 10), torch.randn(24, 7)
    near(linear(gradient, weight.T), gradient.double() @ weight.double())
    near(linear(weight, columns.T), weight.double() @ columns.double())
    near(linear(gradient[:, ::2], weight.T), gradient[:, ::2].double() @ weight.double())
    near(with_transposed(weight, gradient[0].T), weight.double().T @ gradient[0].double().T)
    near(with_few(gradient[0], weight), gradient[0].double() @ weight.double())
    twice = torch.randn(10, 48)[:, ::2]
    near(linear(columns.T, twice), columns.double().T @ twice.double().T)


@pytest.mark.parametrize("count", [1, 3])
def test_products_of_a_batch(by_onednn, count):
    torch.manual_seed(0)
    weight, columns, others = torch.randn(10, 24), torch.randn(count, 24, 7), torch.randn(count, 4, 7)
    near(for_each(weight, columns), weight.double() @ columns.double())
    near(for_each(columns[0].T, columns), columns[0].double().T @ columns.double())
    near(summed(others, columns), (others.double() @ columns.double().mT).sum(0))


def test_an_empty_batch_gives_nothing_and_adds_up_to_zeros(by_onednn):
    weight, none = torch.randn(10, 24), torch.randn(0, 24, 7)
    assert for_each(weight, none).shape == (0, 10, 7) and linear(torch.randn(0, 24), weight).shape == (0, 10)
    assert torch.equal(summed(torch.randn(0, 4, 7), none), torch.zeros(4, 24))
    assert torch.equal(linear(torch.randn(10, 0), torch.randn(24, 0)), torch.zeros(10, 24))


def test_a_compiled_layer_takes_the_same_product(by_onednn, monkeypatch):
    weight, x, calls, product = torch.randn(10, 24), torch.randn(3, 24), [], products._linear
    monkeypatch.setattr(products, "_linear", lambda *args: calls.append(args) or product(*args))
    compiled = torch.compile(lambda x: linear(x, weight) * 2, backend="aot_eager")
    found = [compiled(x) for _ in range(2)]
    torch._dynamo.reset()
    assert torch.equal(found[0], found[1]) and len(calls) == 2, "made when the graph runs, not when it is traced"
    near(found[0], x.double() @ weight.double().T * 2)


def test_what_onednn_is_not_for_is_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    weight, by_onednn = torch.randn(10, 24), products.by_onednn
    assert by_onednn(weight)
    assert not by_onednn(weight.bfloat16()) and not by_onednn(weight.double()) and not by_onednn(weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_onednn(weight) and linear(torch.randn(2, 24), weight).dtype == torch.bfloat16
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not by_onednn(weight)


@pytest.mark.parametrize("name, units, faster", [
    ("AMD EPYC", "AVX512", True), ("AMD Ryzen 9 7950X 16-Core Processor", "AVX512", True), ("AMD EPYC", "AVX2", False),
    ("Intel(R) Xeon(R) Platinum 8481C", "AVX512", False), ("", "AVX512", False),
])  # fmt: skip
@pytest.mark.skipif(not has_onednn, reason="a torch without oneDNN")
def test_onednn_is_taken_where_mkl_leaves_units_idle(monkeypatch, name, units, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() is faster
    finally:
        onednn_is_faster.cache_clear()
