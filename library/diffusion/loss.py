"""The training objective: noisy samples, the error of a prediction, and the weight of each timestep.

Notation as in process.py. Weights are computed from the schedule in use, also with --zero_terminal_snr.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffusion.noise import perturbed, sample_noise
from library.diffusion.process import NoiseProcess, sample_timesteps

if TYPE_CHECKING:
    from library.training.options import LossOptions

MAX_SNR = 1000.0  # a bound for weights that divide by the SNR, which is unbounded towards t = 0


@dataclass(frozen=True)
class NoisySample:
    """The denoiser's input, `latents` (B, C, H, W) with noise at timesteps `t` (B,), and the `target` of its prediction."""

    latents: Tensor
    t: Tensor
    target: Tensor


class Objective:
    """The loss that the options describe, on one device.

    sample = objective.sample(latents)
    losses = objective.losses(predict(sample.latents, sample.t), sample, masks)     # (B,) float32
    """

    def __init__(self, options: LossOptions, process: NoiseProcess, device: torch.device) -> None:
        self.options, self.process = options, process
        self.weights = timestep_weights(process, options).to(device)
        self.widths = huber_widths(process.alphas(device), options)

    def sample(self, latents: Tensor, t: Tensor | None = None) -> NoisySample:
        """Sample noise and, unless they are given, timesteps, for scaled latents (B, C, H, W)."""
        options = self.options
        noise = sample_noise(latents, options)
        if t is None:
            high = self.process.timesteps if options.max_timestep is None else options.max_timestep
            t = sample_timesteps(len(latents), latents.device, options.min_timestep or 0, high)
        return self.at(latents, noise, t, perturbed(noise, options))

    def at(self, latents: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> NoisySample:
        """The sample with this noise at these timesteps; `input_noise`: of the input, if it differs from that of the target."""
        noisy = self.process.add_noise(latents, noise if input_noise is None else input_noise, t)
        return NoisySample(noisy, t, self.process.target(latents, noise, t))

    def losses(self, prediction: Tensor, sample: NoisySample, masks: Tensor | None = None) -> Tensor:
        """Weighted loss of each sample, (B,) float32.

        `masks` (B, 1, H, W) of 0..1 multiply the error of each position; the mean is over all positions, masked ones too.
        """
        errors = element_loss(prediction.float() - sample.target.float(), self.options.loss_type, self.widths[sample.t])
        if masks is not None:
            errors = errors * masks
        return errors.flatten(1).mean(dim=1) * self.weights[sample.t]


def element_loss(difference: Tensor, kind: str, width: Tensor) -> Tensor:
    """The loss of each element's error d, with `width` c (B,) of the pseudo-Huber losses (Charbonnier et al. 1997):

    l2: d**2, l1: |d|, huber: 2 c (sqrt(d**2 + c**2) - c), smooth_l1: 2 (sqrt(d**2 + c**2) - c).
    """
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    c = width.view(-1, *[1] * (difference.ndim - 1))
    squares = difference.square()
    pseudo_huber = 2 * squares / ((squares + c.square()).sqrt() + c)  # = 2 (sqrt(d^2 + c^2) - c) without cancellation
    return pseudo_huber * c if kind == "huber" else pseudo_huber


def huber_widths(a: Tensor, options: LossOptions) -> Tensor:
    """c of every timestep, (T,) float32 (Khrapov et al. 2024, arXiv 2403.16728, sec. 4), each times --huber_scale:

    constant: huber_c; exponential: huber_c ** (t / T), from 1 down to huber_c;
    snr: huber_c + (1 - huber_c) / (1 + q)**2 with q = 1 / sqrt(SNR).
    """
    c, steps = options.huber_c, len(a)
    if options.huber_schedule == "constant":
        widths = torch.full_like(a, c)
    elif options.huber_schedule == "exponential":
        widths = c ** (torch.arange(steps, device=a.device, dtype=a.dtype) / steps)
    else:
        widths = c + (1 - c) / (1 + ((1 - a) / a).sqrt()).square()
    return widths * options.huber_scale


def timestep_weights(process: NoiseProcess, options: LossOptions) -> Tensor:
    """The weight of the loss at every timestep, (T,) float32: the product of the weightings that the options ask for."""
    snr, velocity = process.snr(), process.predicts_velocity
    capped = snr.clamp(max=MAX_SNR)
    weights = torch.ones_like(snr)
    if options.min_snr_gamma:
        weights = weights * min_snr_weights(snr, options.min_snr_gamma, velocity)
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * capped / (capped + 1)
    if options.v_pred_like_loss:
        weights = weights * (1 + options.v_pred_like_loss * (capped + 1) / capped)
    if options.debiased_estimation_loss:  # Yu et al. 2023, arXiv 2310.08442, eq. 11
        weights = weights * (1 / (capped + 1) if velocity else capped.rsqrt())
    return weights


def min_snr_weights(snr: Tensor, gamma: float, predicts_velocity: bool) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, sec. 3.4): min(SNR, gamma) / SNR, for velocity / (SNR + 1)."""
    least = snr.clamp(max=gamma)
    if predicts_velocity:
        return least / (snr + 1)
    return torch.where(snr <= gamma, 1.0, least / snr)  # 1 also at SNR 0
