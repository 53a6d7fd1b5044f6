"""The noise process: the schedule of a model, noisy latents, and the target of its prediction.

Notation: z clean latents, e noise, t timestep, a_t cumulative product of alphas; z_t = sqrt(a_t) z + sqrt(1 - a_t) e
(Ho et al. 2020, arXiv 2006.11239, eq. 4). SNR(t) = a_t / (1 - a_t).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from library.formats.prediction import Prediction

TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


@dataclass(frozen=True)
class NoiseProcess:
    """Stable Diffusion's "scaled linear" schedule (square roots of the betas rise linearly), and what the model predicts."""

    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    beta_start: float = BETA_START
    beta_end: float = BETA_END
    timesteps: int = TRAIN_TIMESTEPS
    # Diffusers' `timestep_spacing` and `steps_offset`, by which samplers choose timesteps; None: each sampler's default.
    spacing: str | None = None
    steps_offset: int | None = None

    @property
    def predicts_velocity(self) -> bool:
        return self.prediction == "v"

    def alphas(self, device: torch.device | str = "cpu") -> Tensor:
        """a_t of every timestep, (T,) float32. Cached: do not change it in place."""
        return _alphas(self, torch.device(device))

    def snr(self, device: torch.device | str = "cpu") -> Tensor:
        """SNR of every timestep, (T,) float32."""
        a = self.alphas(device)
        return a / (1 - a)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(a_t) z + sqrt(1 - a_t) e for latents and noise (B, C, H, W) and timesteps (B,)."""
        a = self.alphas(latents.device)
        return _per_sample(a.sqrt(), t, latents) * latents + _per_sample((1 - a).sqrt(), t, latents) * noise

    def velocity(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(a_t) e - sqrt(1 - a_t) z (Salimans and Ho 2022, arXiv 2202.00512, app. D)."""
        a = self.alphas(latents.device)
        return _per_sample(a.sqrt(), t, latents) * noise - _per_sample((1 - a).sqrt(), t, latents) * latents

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the prediction at z_t."""
        return self.velocity(latents, noise, t) if self.predicts_velocity else noise

    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of a Diffusers scheduler with this schedule, without zero terminal SNR."""
        spacing = {"timestep_spacing": self.spacing, "steps_offset": self.steps_offset}
        return {
            **{name: value for name, value in spacing.items() if value is not None},
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": self.timesteps,
            "prediction_type": "v_prediction" if self.predicts_velocity else "epsilon",
        }


@lru_cache(maxsize=16)
def _alphas(process: NoiseProcess, device: torch.device) -> Tensor:
    betas = torch.linspace(process.beta_start**0.5, process.beta_end**0.5, process.timesteps, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0)
    return (with_zero_terminal_snr(alphas) if process.zero_terminal_snr else alphas).to(device)


def with_zero_terminal_snr(a: Tensor) -> Tensor:
    """The schedule shifted and scaled so that the last timestep is pure noise and the first stays as it is.

    On r_t = sqrt(a_t): r'_t = (r_t - r_last) r_first / (r_first - r_last) (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    roots = a.double().sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square().to(a.dtype)


def sample_timesteps(count: int, device: torch.device, low: int = 0, high: int = TRAIN_TIMESTEPS) -> Tensor:
    """`count` timesteps, uniform on low..high - 1, int64."""
    return torch.randint(low, high, (count,), device=device)


def _per_sample(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] shaped to broadcast over (B, C, H, W)."""
    return values[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
