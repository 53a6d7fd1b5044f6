"""The denoising loop: noise from seeds, guidance, the sampler's steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from library.models.family import Conditioning

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from library.models.family import Model


@dataclass
class Guidance:
    """A denoiser under guidance: it computes one, two or three predictions for B latents and combines them by `guide`.

    Guidance is off without `negative`. With `empty` too, the negative prompt has a scale of its own. With regions the context of
    `positive` is (P * B, N, width): the first sub-prompt of every image, then the second of every image, and so on.
    scales, negative_scales: one for each image. sizes (B, 6): as in `library.data.dataset.Batch`; negative_sizes: those for
    the negative and the empty prompt.
    """

    model: Model
    sizes: Tensor
    negative_sizes: Tensor
    positive: Conditioning
    negative: Conditioning | None
    empty: Conditioning | None
    scales: list[float]
    negative_scales: list[float]

    def __post_init__(self) -> None:
        conditionings = [part for part in (self.empty, self.negative, self.positive) if part is not None]
        self.predictions = len(conditionings)
        self.dtype = next(self.model.denoiser.parameters()).dtype
        self._conditioning = Conditioning.cat(conditionings).to(self.dtype)
        self._sizes = torch.cat([*[self.negative_sizes] * (self.predictions - 1), self.sizes])

    def __call__(self, noisy: Tensor, t: Tensor) -> Tensor:
        """The guided prediction, float32, at `noisy` (B, C, h, w) and one timestep."""
        rows = torch.cat([noisy] * self.predictions).to(self.dtype)
        predicted = self.model.predict(rows, t, self._conditioning, self._sizes).float()
        factors = [torch.tensor(values, device=noisy.device).view(-1, 1, 1, 1) for values in (self.scales, self.negative_scales)]
        return guide(predicted.chunk(self.predictions), *factors)


def start_noise(generators: list[Generator], channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (B, channels, height, width), float32 on the CPU, so that every device starts from the same."""
    return torch.cat([torch.randn((1, channels, height, width), generator=generator) for generator in generators])


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: SchedulerMixin,
    latents: Tensor,
    *,
    generators: list[Generator],
    timesteps: Tensor | None = None,
    after_step: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Follow the scheduler from `latents` (B, C, h, w), which have the noise of its first timestep, to clean ones, float32.

    predict: (noisy latents, timestep) -> prediction, both (B, C, h, w). generators: one for each image; the sampler's own noise
    is drawn from them. timesteps: a part of the scheduler's, to begin later. after_step: gets the latents after each step and the
    timestep that comes next (None after the last), and returns the latents to go on with.
    """
    latents = latents.float()
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if takes_generators else {}
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    for index, timestep in enumerate(timesteps):
        predicted = predict(scheduler.scale_model_input(latents, timestep), timestep)
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
