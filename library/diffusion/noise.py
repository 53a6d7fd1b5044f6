"""Noise for training: offset noise, multi-resolution noise and input perturbation. Shapes (B, C, H, W).

Random numbers come from torch's and Python's global generators, which the trainer seeds for every batch.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from library.training.options import LossOptions


def sample_noise(latents: Tensor, options: LossOptions) -> Tensor:
    """Gaussian noise of the shape of `latents`, with the offset and the coarser levels that the options ask for."""
    noise = torch.randn_like(latents)
    if options.noise_offset:
        noise = noise + offset(latents, options)
    if options.multires_noise_iterations:
        noise = add_coarser_levels(noise, options.multires_noise_iterations, options.multires_noise_discount)
    return noise


def offset(latents: Tensor, options: LossOptions) -> Tensor:
    """A shift of whole channels, (B, C, 1, 1): strength * N(0, 1) (N. Guttenberg 2023, "Diffusion with Offset Noise").

    The strength is --noise_offset; with --noise_offset_random_strength times one uniform number for each batch. With
    --adaptive_noise_scale s it is max(0, strength + s * |mean of the channel|).
    """
    strength: float | Tensor = options.noise_offset or 0.0
    shift = torch.randn(*latents.shape[:2], 1, 1, device=latents.device, dtype=latents.dtype)
    if options.noise_offset_random_strength:
        strength = strength * torch.rand(1, device=latents.device, dtype=latents.dtype)
    if options.adaptive_noise_scale:
        strength = (strength + options.adaptive_noise_scale * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    return strength * shift


def add_coarser_levels(noise: Tensor, levels: int, discount: float) -> Tensor:
    """Multi-resolution noise (J. Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training"), scaled to deviation 1.

    Level i, counted from 0, is N(0, 1) on sides that are r**i times shorter than the full ones, r uniform in [2, 4),
    enlarged and multiplied by discount**i; the last level is the first one with a side of length 1.
    """
    height, width = noise.shape[2:]
    total = noise
    for level in range(levels):
        ratio = random.uniform(2, 4) ** level
        sides = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
        coarse = torch.randn(*noise.shape[:2], *sides, device=noise.device, dtype=noise.dtype)
        total = total + discount**level * F.interpolate(coarse, (height, width), mode="bilinear")
        if 1 in sides:
            break
    return total / total.std()


def perturbed(noise: Tensor, options: LossOptions) -> Tensor:
    """The noise of the input, e + g n, while the target keeps e = `noise` (Ning et al. 2023, arXiv 2301.11706, eq. 9).

    n is other noise, N(0, 1); g is --ip_noise_gamma; with --ip_noise_gamma_random_strength times one uniform number a batch.
    """
    if not options.ip_noise_gamma:
        return noise
    strength: float | Tensor = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        strength = strength * torch.rand(1, device=noise.device, dtype=noise.dtype)
    return noise + strength * torch.randn_like(noise)
