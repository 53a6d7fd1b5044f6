"""The diffusion process: noise schedule, noised latents, targets. Pure functions on tensors.

Notation: z clean latents, e noise, t timestep, a_t cumulative product of alphas; z_t = sqrt(a_t) z + sqrt(1 - a_t) e
(Ho et al. 2020, arXiv 2006.11239, eq. 4). SNR(t) = a_t / (1 - a_t).
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


def alphas_cumprod(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = TRAIN_TIMESTEPS) -> Tensor:
    """a_t of Stable Diffusion's "scaled linear" schedule: betas whose square roots rise linearly. (steps,) float32."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def with_zero_terminal_snr(a: Tensor) -> Tensor:
    """The schedule shifted and scaled so that the last timestep is pure noise and the first stays as it is.

    On r_t = sqrt(a_t): r'_t = (r_t - r_last) r_first / (r_first - r_last) (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    roots = a.double().sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square().to(a.dtype)


def signal_to_noise(a: Tensor) -> Tensor:
    """SNR of each timestep."""
    return a / (1 - a)


def per_sample(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] shaped to broadcast over (B, C, H, W)."""
    return values[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def sample_timesteps(count: int, device: torch.device, low: int = 0, high: int = TRAIN_TIMESTEPS) -> Tensor:
    """`count` timesteps, uniform on low..high - 1, int64."""
    return torch.randint(low, high, (count,), device=device)


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z + sqrt(1 - a_t) e."""
    return per_sample(a.sqrt(), t, latents) * latents + per_sample((1 - a).sqrt(), t, latents) * noise


def target(latents: Tensor, noise: Tensor, t: Tensor, a: Tensor, v_parameterization: bool) -> Tensor:
    """What the model should say: e, or the velocity sqrt(a_t) e - sqrt(1 - a_t) z (Salimans and Ho 2022, arXiv 2202.00512, D)."""
    if not v_parameterization:
        return noise
    return per_sample(a.sqrt(), t, latents) * noise - per_sample((1 - a).sqrt(), t, latents) * latents
