"""The denoising loop: noise from seeds, guidance, the sampler's steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from library.models.model import predict_noise

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass
class Contexts:
    """What the U-Net reads beside the latents of B pictures, each (B, N, width).

    Guidance is off without `negative`. With `empty` too, the negative prompt has a scale of its own. With regions `positive` is
    (P * B, N, width): the first sub-prompt of every picture, then the second of every picture, and so on.
    """

    positive: Tensor
    negative: Tensor | None = None
    empty: Tensor | None = None

    @property
    def rows(self) -> list[Tensor]:
        """In the order in which the U-Net gets them."""
        return [rows for rows in (self.empty, self.negative, self.positive) if rows is not None]


def start_noise(generators: list[Generator], channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (B, channels, height, width), float32 on the CPU, so that every device starts from the same."""
    return torch.cat([torch.randn((1, channels, height, width), generator=generator) for generator in generators])


def denoise(
    unet: nn.Module,
    scheduler: SchedulerMixin,
    latents: Tensor,
    contexts: Contexts,
    *,
    scales: list[float],
    generators: list[Generator],
    negative_scales: list[float] | None = None,
    timesteps: Tensor | None = None,
    after_step: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Follow the scheduler from `latents` (B, C, h, w), which have the noise of its first timestep, to clean ones, float32.

    scales, negative_scales: of the guidance, one a picture; see `guide`. generators: one a picture; the sampler's own noise is
    drawn from them. timesteps: a part of the scheduler's, to begin later. after_step: gets the latents after each step and the
    timestep that comes next (None after the last), and returns the latents to go on with.
    """
    latents = latents.float()
    dtype = next(unet.parameters()).dtype
    predictions = len(contexts.rows)
    context = torch.cat(contexts.rows).to(dtype)
    factors = [torch.tensor(values, device=latents.device).view(-1, 1, 1, 1) for values in (scales, negative_scales or scales)]
    draws = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if draws else {}
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    for index, timestep in enumerate(timesteps):
        noisy = scheduler.scale_model_input(torch.cat([latents] * predictions), timestep)
        predicted = predict_noise(unet, noisy.to(dtype), timestep, context).float()
        predicted = guide(predicted.chunk(predictions), *factors)
        latents = scheduler.step(predicted, timestep, latents, **step_options, return_dict=False)[0]
        if after_step is not None:
            latents = after_step(latents, timesteps[index + 1] if index + 1 < len(timesteps) else None)
        if on_step is not None:
            on_step()
    return latents


def guide(predicted: tuple[Tensor, ...], scale: Tensor, negative_scale: Tensor) -> Tensor:
    """One prediction of (positive), (negative, positive) or (empty, negative, positive) ones.

    e = e_neg + scale (e_pos - e_neg), or e = e_0 + scale (e_pos - e_0) - negative_scale (e_neg - e_0).
    """
    base, wanted = predicted[0], predicted[-1]
    if len(predicted) == 1:
        return wanted
    guided = base + scale * (wanted - base)
    return guided if len(predicted) == 2 else guided - negative_scale * (predicted[1] - base)
