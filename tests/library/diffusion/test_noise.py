"""Noise against the same formulas in float64 NumPy, on the numbers that torch drew, and by what it is for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from library.diffusion.noise import add_coarser_levels, offset, perturbed, sample_noise
from library.training.options import LossOptions

SHAPE = (3, 4, 24, 16)


@pytest.fixture
def latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) + 0.5


def drawn(seed: int, *shapes: tuple[int, ...], uniform: tuple[int, ...] = ()) -> list[np.ndarray]:
    """What torch draws from this seed: normal numbers of these shapes, in float64; uniform ones at these places."""
    torch.manual_seed(seed)
    return [(torch.rand if i in uniform else torch.randn)(shape).double().numpy() for i, shape in enumerate(shapes)]


def test_without_options_it_is_plain_gaussian_noise(latents):
    torch.manual_seed(1)
    assert torch.equal(sample_noise(latents, LossOptions()), torch.from_numpy(drawn(1, SHAPE)[0]).float())


@pytest.mark.option("noise_offset")
def test_noise_offset_adds_one_number_to_each_channel_of_each_sample(latents):
    e, n = drawn(2, SHAPE, (3, 4, 1, 1))
    torch.manual_seed(2)
    np.testing.assert_allclose(sample_noise(latents, LossOptions(noise_offset=0.5)), e + 0.5 * n, atol=1e-6)


def test_noise_offset_has_the_strength_asked_for():
    torch.manual_seed(1)
    noise = sample_noise(torch.zeros(4000, 4, 1, 1), LossOptions(noise_offset=0.5))
    assert noise.var().item() == pytest.approx(1 + 0.25, rel=0.05)


@pytest.mark.option("noise_offset_random_strength")
def test_noise_offset_random_strength_is_one_uniform_number_a_batch(latents):
    n, u = drawn(3, (3, 4, 1, 1), (1,), uniform=(1,))
    torch.manual_seed(3)
    shift = offset(latents, LossOptions(noise_offset=0.5, noise_offset_random_strength=True))
    np.testing.assert_allclose(shift, 0.5 * u * n, atol=1e-6)
    assert 0 < u < 1


@pytest.mark.option("adaptive_noise_scale")
@pytest.mark.parametrize("scale", [0.3, -0.8])
def test_adaptive_noise_scale_follows_the_mean_of_each_channel_and_never_turns_round(latents, scale):
    (n,) = drawn(4, (3, 4, 1, 1))
    strength = np.maximum(0, 0.2 + scale * np.abs(latents.double().numpy().mean(axis=(2, 3), keepdims=True)))
    torch.manual_seed(4)
    shift = offset(latents, LossOptions(noise_offset=0.2, adaptive_noise_scale=scale))
    np.testing.assert_allclose(shift, strength * n, atol=1e-6)
    assert scale > 0 or (shift == 0).any()


def enlarge(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear enlargement whose pixels are areas (OpenCV's and torch's default), borders repeated."""
    for axis, size in ((2, height), (3, width)):
        old = values.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(position).astype(int)
        high, part = np.minimum(low + 1, old - 1), position - low
        shape = [1] * 4
        shape[axis] = size
        values = np.take(values, low, axis) * (1 - part.reshape(shape)) + np.take(values, high, axis) * part.reshape(shape)
    return values


def test_trap_5_5_multires_levels_shrink_from_the_full_size():
    torch.manual_seed(6)
    random.seed(6)
    noise = torch.randn(SHAPE)
    seen = add_coarser_levels(noise, 4, 0.5).double().numpy()
    random.seed(6)
    sides, shapes = [], []
    for level in range(4):
        ratio = random.uniform(2, 4) ** level
        sides.append((max(1, int(24 / ratio)), max(1, int(16 / ratio))))
    assert sides[0] == SHAPE[2:] and min(sides[2]) >= 1
    shapes = [(3, 4, *side) for side in sides[: next((i for i, s in enumerate(sides) if 1 in s), 3) + 1]]
    e, *levels = drawn(6, SHAPE, *shapes)
    total = e + sum(0.5**i * enlarge(level, 24, 16) for i, level in enumerate(levels))
    np.testing.assert_allclose(seen, total / total.std(ddof=1), atol=1e-5)


@pytest.mark.option("multires_noise_iterations", "multires_noise_discount")
def test_multires_noise_has_deviation_one_and_more_in_the_large():
    random.seed(0)
    torch.manual_seed(0)
    latents = torch.zeros(8, 4, 64, 64)
    options = {"multires_noise_iterations": 6, "multires_noise_discount": 0.8}
    coarse, plain = (sample_noise(latents, LossOptions(**more)) for more in (options, {}))
    assert coarse.std().item() == pytest.approx(1, abs=1e-4)
    block_means = [torch.nn.functional.avg_pool2d(noise, 8).std() for noise in (coarse, plain)]
    assert block_means[0] > 2 * block_means[1]
    random.seed(0)
    torch.manual_seed(0)
    weaker = sample_noise(latents, LossOptions(multires_noise_iterations=6, multires_noise_discount=0.1))
    assert torch.nn.functional.avg_pool2d(weaker, 8).std() < block_means[0] / 1.5


def test_offset_comes_before_the_coarser_levels(latents):
    random.seed(7)
    torch.manual_seed(7)
    both = sample_noise(latents, LossOptions(noise_offset=0.5, multires_noise_iterations=2))
    random.seed(7)
    torch.manual_seed(7)
    noise = torch.randn(SHAPE)
    shifted = noise + 0.5 * torch.randn(3, 4, 1, 1)
    torch.testing.assert_close(both, add_coarser_levels(shifted, 2, 0.3))


@pytest.mark.option("ip_noise_gamma", "ip_noise_gamma_random_strength")
def test_ip_noise_gamma_perturbs_the_input_alone(latents):
    noise = torch.ones(SHAPE)
    (n,) = drawn(8, SHAPE)
    torch.manual_seed(8)
    np.testing.assert_allclose(perturbed(noise, LossOptions(ip_noise_gamma=0.1)), 1 + 0.1 * n, atol=1e-6)
    assert perturbed(noise, LossOptions()) is noise
    u, n = drawn(9, (1,), SHAPE, uniform=(0,))
    torch.manual_seed(9)
    seen = perturbed(noise, LossOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True))
    np.testing.assert_allclose(seen, 1 + 0.1 * u * n, atol=1e-6)
