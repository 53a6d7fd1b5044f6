"""Products of matrices: either library's beside float64, and which of them is taken."""

from __future__ import annotations

import pytest
import torch

from library import products
from library.products import by_onednn, linear, onednn_is_faster, with_transposed

has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not has_onednn, reason="a torch without oneDNN"))])
def library(request, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


def near(found, reference):
    assert found.dtype == torch.float32 and found.shape == reference.shape
    assert (found.double() - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (2, 7, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layers_product_is_that_of_float64(library, shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(10, 24)
    bias = torch.randn(10) if with_bias else None
    assert by_onednn(weight) == library
    near(linear(x, weight, bias), x.double() @ weight.double().T + (bias.double() if with_bias else 0))


def test_factors_may_lie_in_any_order(library):
    torch.manual_seed(0)
    weight, gradient, columns = torch.randn(10, 24), torch.randn(3, 7, 10), torch.randn(24, 7)
    near(linear(gradient, weight.T), gradient.double() @ weight.double())
    near(linear(weight, columns.T), weight.double() @ columns.double())
    near(linear(gradient[:, ::2], weight.T), gradient[:, ::2].double() @ weight.double())
    near(with_transposed(weight, gradient[0].T), weight.double().T @ gradient[0].double().T)
    twice = torch.randn(10, 48)[:, ::2]
    near(linear(columns.T, twice), columns.double().T @ twice.double().T)


def test_what_onednn_is_not_for_is_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    weight = torch.randn(10, 24)
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
