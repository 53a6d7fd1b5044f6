"""The low-rank algebra against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.formats import low_rank
from library.formats.low_rank import LowRank

SHAPES = {"linear": (40, 24), "conv 1x1": (40, 24, 1, 1), "conv 3x3": (40, 24, 3, 3)}


def module(shape: tuple[int, ...], rank: int, alpha: float, seed: int = 0) -> LowRank:
    """A random module for a layer of this shape."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return LowRank(up[:, :, None, None] if len(shape) == 4 else up, down, alpha)


def dense(m: LowRank, factor: float = 1.0) -> np.ndarray:
    """The full (out, in * k * k) matrix in float64, written from the format's rule."""
    up, down = m.up.double().numpy(), m.down.double().numpy()
    return factor * m.alpha / down.shape[0] * np.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def optimum(matrix: np.ndarray, rank: int) -> float:
    return float(np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_delta_and_norm(shape):
    m = module(shape, 5, 2.0)
    assert low_rank.delta(m).shape == shape
    assert relative(low_rank.delta(m, 0.7).double().numpy().reshape(40, -1), dense(m, 0.7)) < 1e-6
    assert low_rank.norm(m) == pytest.approx(np.linalg.norm(dense(m)), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_stack_is_the_sum_of_the_products(shape):
    parts = [(module(shape, 3, 1.5, 1), 0.8), (module(shape, 7, 7, 2), -0.5), (module(shape, 1, 4, 3), 2)]
    result = low_rank.stack(parts)
    assert result.rank == 11 and result.alpha == 11
    assert result.down.shape[1:] == shape[1:] and result.up.dim() == len(shape)
    assert relative(dense(result), sum(dense(m, q) for m, q in parts)) < 1e-6


def test_stack_takes_linear_and_1x1_convolution_together():
    linear, conv = module((8, 6), 2, 2), module((8, 6, 1, 1), 3, 1, 5)
    result = low_rank.stack([(linear, 1), (conv, 1)])
    assert result.down.shape == (5, 6) and result.up.shape == (8, 5)
    assert relative(dense(result), dense(linear) + dense(conv)) < 1e-6


def test_stack_refuses_other_sizes():
    with pytest.raises(UserError, match="sizes differ: 6 in, 8 out and 7 in, 8 out"):
        low_rank.stack([(module((8, 6), 2, 2), 1), (module((8, 7), 2, 2), 1)])


def test_trap_1_4_alpha_fits_the_stacked_rank():
    m = module((10, 10), 4, 1.0)
    result = low_rank.stack([(m, 0.5), (m, 0.5)])
    assert result.scale == 1
    assert relative(dense(result), dense(m)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("rank", [3, 30])  # 30: more than the layer has
def test_decompose_gives_the_singular_values(shape, rank):
    m = module(shape, rank, 2.0)
    found = low_rank.decompose(m)
    expected = np.linalg.svd(dense(m), compute_uv=False)
    count = min(rank, 24 * (9 if shape[2:] == (3, 3) else 1), 40)
    assert len(found.s) == count
    np.testing.assert_allclose(found.s.numpy(), expected[:count], rtol=1e-5, atol=1e-5 * expected[0])
    assert found.total == pytest.approx(np.linalg.norm(expected), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("alpha", [1.0, 8.0, -2.0])
def test_truncate_is_the_best_of_its_rank_and_keeps_the_scale(shape, alpha):
    m = module(shape, 8, alpha)
    result = low_rank.truncate(m, 3)
    assert result.rank == 3 and result.scale == pytest.approx(m.scale)
    assert result.down.shape == (3, *shape[1:])
    assert np.linalg.norm(dense(m) - dense(result)) == pytest.approx(optimum(dense(m), 3), rel=1e-5)
    assert low_rank.truncate(m, 8) is m and low_rank.truncate(m, 100) is m


def test_a_module_of_zeros():
    m = LowRank(torch.zeros(6, 2), torch.ones(2, 5), 1.0)
    found = low_rank.decompose(m)
    result = found.low_rank(1, m)
    assert found.kept(1) == 1 and result.is_finite() and np.all(dense(result) == 0)
    assert low_rank.smallest_rank(found.s, "sv_fro", 0.9) == 1


def test_shuffle_keeps_the_product():
    m = module((9, 7), 6, 3)
    result = low_rank.shuffle(m, torch.Generator().manual_seed(1))
    assert not torch.equal(result.up, m.up) and relative(dense(result), dense(m)) < 1e-6


def test_trap_3_4_split_is_the_first_ranks_at_the_same_scale():
    m = module((9, 7, 3, 3), 6, 3)
    result = low_rank.split(m, 2)
    assert torch.equal(result.up, m.up[:, :2]) and torch.equal(result.down, m.down[:2])
    assert result.scale == m.scale and result.alpha == 1


def test_trap_1_7_clamping_is_by_absolute_value():
    m = LowRank(torch.tensor([[-9.0], [1.0], [2.0], [8.0]]), torch.tensor([[3.0, -7.0, 0.5, 1.0, 1.0, 1.0]]), 1.0)
    result = low_rank.clamp(m, 0.8)
    assert result.up.flatten().tolist() == [-7, 1, 2, 7]
    assert result.down.flatten().tolist() == [3, -7, 0.5, 1, 1, 1]


# ---------------------------------------------------------------- choosing a rank


def test_trap_1_12_the_smallest_rank_that_reaches_the_target():
    s = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # sum 16
    assert low_rank.smallest_rank(s, "sv_ratio", 4.0) == 3  # 8, 4, 2 are at least 8 / 4
    assert low_rank.smallest_rank(s, "sv_ratio", 3.9) == 2
    assert low_rank.smallest_rank(s, "sv_cumulative", 0.75) == 2
    assert low_rank.smallest_rank(s, "sv_cumulative", 0.76) == 3
    assert low_rank.smallest_rank(s, "sv_cumulative", 1.0) == 5
    assert low_rank.smallest_rank(s, "sv_fro", (80 / 86) ** 0.5) == 2
    assert low_rank.smallest_rank(s, "sv_fro", (81 / 86) ** 0.5) == 3
    assert low_rank.smallest_rank(s, "sv_fro", 0.01) == 1


# ---------------------------------------------------------------- dense matrices


def with_spectrum(s: np.ndarray, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((shape[0], len(s))))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], len(s))))[0]
    return torch.from_numpy((u * s) @ v.T).float()


N = np.arange(160)
SPECTRA = {
    "flat": np.ones(160),
    "nearly flat": 1 + 0.001 * np.cos(N),
    "slow decay": 1 / (1 + N) ** 0.5,
    "fast decay": 0.5**N,
    "very fast decay": 0.05**N,
    "low rank and noise": np.where(N < 5, 10.0, 0.3),
    "one strong": np.where(N < 1, 1000.0, 0.01),
    "exactly rank 4": np.where(N < 4, 1.0, 0.0),
}


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", [(160, 300), (300, 160)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", SPECTRA)
def test_best_low_rank_is_within_a_thousandth_of_the_optimum(name, shape, rank):
    matrix = with_spectrum(SPECTRA[name], shape)
    found = low_rank.best_low_rank(matrix, rank)
    result = found.low_rank(rank, shape)
    full = matrix.double().numpy()
    error, best = np.linalg.norm(full - dense(result)), optimum(full, rank)
    rounding = 3e-7 * np.linalg.norm(full)  # of the factors in float32
    assert error <= best * 1.001 + rounding
    assert found.error(rank) == pytest.approx(error, rel=2e-3, abs=rounding)  # the measured error is the real one
    assert result.alpha == rank


def test_best_low_rank_of_noise():
    matrix = torch.randn(500, 260, generator=torch.Generator().manual_seed(3))
    full = matrix.double().numpy()
    for rank in (4, 32):
        result = low_rank.best_low_rank(matrix, rank).low_rank(rank, matrix.shape)
        assert np.linalg.norm(full - dense(result)) <= 1.001 * optimum(full, rank)


def test_best_low_rank_is_the_same_every_time():
    torch.manual_seed(0)
    matrix = torch.randn(200, 220)
    first, second = (low_rank.best_low_rank(matrix, 4) for _ in range(2))
    assert torch.equal(first.u, second.u) and torch.equal(first.vh, second.vh)


def test_best_low_rank_falls_back_to_the_exact_way(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(low_rank, "MAX_PASSES", 1)
    matrix = torch.randn(200, 220)
    assert len(low_rank.best_low_rank(matrix, 4).s) == 200


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["slow decay", "fast decay", "flat"])
def test_a_share_picks_the_smallest_rank(name, share):
    matrix = with_spectrum(SPECTRA[name], (160, 300))
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    expected = int(np.argmax(np.sqrt(np.cumsum(s**2)) >= share * np.linalg.norm(s))) + 1
    found = low_rank.best_low_rank(matrix, share=share)
    assert abs(low_rank.rank_for_share(found, share) - expected) <= (1 if name == "flat" else 0)
    assert low_rank.rank_for_share(low_rank.best_low_rank(matrix, 3, share=share), share) == min(3, expected)


def test_a_difference_of_zeros_and_one_with_nan():
    found = low_rank.best_low_rank(torch.zeros(100, 90), 4)
    result = found.low_rank(4, (100, 90))
    assert result.rank == 4 and result.is_finite() and not dense(result).any()
    with pytest.raises(UserError, match="NaN or infinity"):
        low_rank.best_low_rank(torch.full((5, 5), float("nan")), 2)


def test_no_convergence_is_tried_again_and_then_an_error(monkeypatch):
    m, right, calls = module((20, 10), 3, 1), torch.linalg.svd, []

    def failing(matrix, full_matrices=True):
        calls.append(1)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("no convergence")
        return right(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    failures = 1
    assert relative(dense(low_rank.decompose(m).low_rank(3, m)), dense(m)) < 1e-5
    failures = 100
    with pytest.raises(UserError, match="no convergence"):
        low_rank.decompose(m)


@pytest.mark.parametrize("rank", [4, 40, 200])  # as factors, at the limit, and as a full matrix
@pytest.mark.parametrize("shape", [(48, 48), (96, 48), (32, 16, 3, 3)])
def test_wide_stacks_are_decomposed_as_full_matrices_with_the_same_result(rank, shape):
    torch.manual_seed(0)
    up, down = torch.randn(shape[0], rank), torch.randn(rank, *shape[1:])
    module = LowRank(up if len(shape) == 2 else up[:, :, None, None], down, -2.0)
    found = low_rank.decompose(module, most=3)
    u, s, vh = torch.linalg.svd(module.scale * up.double() @ down.double().flatten(1), full_matrices=False)
    torch.testing.assert_close(found.s, s[: min(rank, *module.matrix_shape)], rtol=1e-6, atol=1e-7 * s[0].item())
    product = found.u.double() * found.s[:3] @ found.vh.double()
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ vh[:3], atol=1e-5 * s[0].item(), rtol=1e-5)
    assert found.u.shape[1] == len(found.vh) == 3
