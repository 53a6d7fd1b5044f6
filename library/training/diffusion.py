"""Diffusion mathematics of training: noise, timesteps, targets, loss weights. Pure functions on tensors.

Notation: z clean latents, e noise, t timestep, a_t cumulative product of alphas; z_t = sqrt(a_t) z + sqrt(1 - a_t) e
(Ho et al. 2020, eq. 4). SNR(t) = a_t / (1 - a_t).
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


def alphas_cumprod(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = TRAIN_TIMESTEPS) -> Tensor:
    """a_t of Stable Diffusion's "scaled linear" schedule: betas whose square roots rise linearly. (steps,) float32."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def _per_sample(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] shaped to broadcast over (B, C, H, W)."""
    return values[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def sample_noise(latents: Tensor, noise_offset: float | None = None) -> Tensor:
    """Gaussian noise like `latents`; noise_offset adds one N(0, 1) number times it to each (sample, channel)."""
    noise = torch.randn_like(latents)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*latents.shape[:2], 1, 1, device=latents.device, dtype=latents.dtype)
    return noise


def sample_timesteps(count: int, device: torch.device) -> Tensor:
    """`count` timesteps, uniform on 0..999, int64."""
    return torch.randint(0, TRAIN_TIMESTEPS, (count,), device=device)


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z + sqrt(1 - a_t) e."""
    return _per_sample(a.sqrt(), t, latents) * latents + _per_sample((1 - a).sqrt(), t, latents) * noise


def target(latents: Tensor, noise: Tensor, t: Tensor, a: Tensor, v_parameterization: bool) -> Tensor:
    """What the model should say: e, or the velocity sqrt(a_t) e - sqrt(1 - a_t) z (Salimans and Ho 2022, sec. 4)."""
    if not v_parameterization:
        return noise
    return _per_sample(a.sqrt(), t, latents) * noise - _per_sample((1 - a).sqrt(), t, latents) * latents


def min_snr_weight(t: Tensor, a: Tensor, gamma: float, v_parameterization: bool) -> Tensor:
    """Min-SNR-gamma loss weights (Hang et al. 2023): min(SNR, gamma) / SNR, for velocity / (SNR + 1). (B,) float32."""
    snr = (a / (1 - a))[t]
    return snr.clamp(max=gamma) / (snr + 1 if v_parameterization else snr)


def loss_per_sample(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample, computed in float32. (B, ...) -> (B,)."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(dim=1)
