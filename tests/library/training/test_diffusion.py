from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from library.training import diffusion


@pytest.fixture
def schedule():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def test_alphas_against_float64_and_diffusers(schedule):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    wanted = np.cumprod(1 - betas)
    np.testing.assert_allclose(diffusion.alphas_cumprod().numpy(), wanted, rtol=2e-5)
    assert torch.equal(diffusion.alphas_cumprod(), schedule.alphas_cumprod)


def test_add_noise_and_velocity_equal_diffusers(schedule):
    torch.manual_seed(0)
    z, e, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    a = diffusion.alphas_cumprod()
    torch.testing.assert_close(diffusion.add_noise(z, e, t, a), schedule.add_noise(z, e, t))
    torch.testing.assert_close(diffusion.target(z, e, t, a, True), schedule.get_velocity(z, e, t))
    assert diffusion.target(z, e, t, a, False) is e


def test_noise_offset_shifts_whole_channels():
    torch.manual_seed(0)
    plain = diffusion.sample_noise(torch.zeros(2, 4, 64, 64))
    torch.manual_seed(0)
    shifted = diffusion.sample_noise(torch.zeros(2, 4, 64, 64), noise_offset=0.5)
    shift = shifted - plain
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert shift[:, :, 0, 0].std() > 0.1


def test_noise_offset_has_the_strength_asked_for():
    torch.manual_seed(1)
    shift = diffusion.sample_noise(torch.zeros(4000, 4, 1, 1), 0.5)
    assert shift.var().item() == pytest.approx(1 + 0.25, rel=0.05)


@pytest.mark.parametrize("v", [False, True])
def test_min_snr_weights_against_the_formula(v):
    a = diffusion.alphas_cumprod()
    t = torch.tensor([0, 10, 300, 700, 999])
    snr = (a.double() / (1 - a.double()))[t]
    wanted = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1 if v else snr)
    torch.testing.assert_close(diffusion.min_snr_weight(t, a, 5.0, v).double(), wanted, rtol=1e-4, atol=1e-6)


def test_loss_per_sample_is_the_mean_square_in_float32():
    a, b = torch.randn(3, 4, 8, 8).bfloat16(), torch.randn(3, 4, 8, 8)
    wanted = ((a.double() - b.double()) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(diffusion.loss_per_sample(a, b).double(), wanted, rtol=1e-5, atol=1e-6)


def test_timesteps_are_uniform_and_cover_both_ends():
    torch.manual_seed(0)
    t = diffusion.sample_timesteps(200_000, torch.device("cpu"))
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 2
