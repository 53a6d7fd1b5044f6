from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion.process import NoiseProcess, sample_timesteps


@pytest.fixture
def schedule():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def alphas64() -> np.ndarray:
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_alphas_against_float64_and_diffusers(schedule):
    np.testing.assert_allclose(NoiseProcess().alphas().numpy(), alphas64(), rtol=2e-5)
    assert torch.equal(NoiseProcess().alphas(), schedule.alphas_cumprod)


def test_add_noise_and_velocity_equal_diffusers(schedule):
    torch.manual_seed(0)
    z, e, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    plain, velocity = NoiseProcess(), NoiseProcess("v")
    torch.testing.assert_close(plain.add_noise(z, e, t), schedule.add_noise(z, e, t))
    torch.testing.assert_close(velocity.target(z, e, t), schedule.get_velocity(z, e, t))
    assert plain.target(z, e, t) is e


def test_timesteps_are_uniform_and_cover_both_ends():
    torch.manual_seed(0)
    t = sample_timesteps(200_000, torch.device("cpu"))
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 2


def test_zero_terminal_snr_against_float64_and_diffusers():
    roots = np.sqrt(alphas64())
    wanted = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    rescaled = NoiseProcess(zero_terminal_snr=True).alphas()
    np.testing.assert_allclose(rescaled.numpy(), wanted, rtol=1e-4, atol=1e-9)
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    torch.testing.assert_close(rescaled, theirs, rtol=1e-3, atol=1e-6)
    assert rescaled[-1] == 0 and rescaled[0] == pytest.approx(alphas64()[0]) and (rescaled[1:] < rescaled[:-1]).all()
