"""From a batch to its loss: latents, text, noise and the model's prediction. All that asks the model while training is here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from library.data.dataset import Batch
from library.diffusion.loss import Objective
from library.models.family import Conditioning, Model


class BatchLoss:
    """The diffusion loss of batches, on the model's device.

    autocast: the context of the run's arithmetic.
    """

    def __init__(
        self, model: Model, objective: Objective, *, device: torch.device,
        autocast: Callable[[], AbstractContextManager], trains_text_encoder: bool, clip_skip: int | None,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.device, self.autocast = model, objective, device, autocast
        self.trains_text_encoder, self.clip_skip = trains_text_encoder, clip_skip

    def __call__(self, batch: Batch) -> Tensor:
        """The loss to train with, a float32 scalar."""
        latents, conditioning = self.latents(batch), self.conditioning(batch)
        sample = self.objective.sample(latents)
        with self.autocast():
            prediction = self.model.predict(sample.latents, sample.t, conditioning, self.sizes(batch))
        masks = None if batch.masks is None else batch.masks.to(latents.device, non_blocking=True)
        losses = self.objective.losses(prediction, sample, masks)
        return (losses * batch.loss_weights.to(losses.device, non_blocking=True)).mean()

    def unweighted(self, batch: Batch, noise_of: Callable[[torch.Size], Tensor], t: Tensor) -> Tensor:
        """Squared errors (B,) at given noise and timesteps (B,), without any weights, so that runs can be compared."""
        latents = self.latents(batch)
        sample = self.objective.at(latents, noise_of(latents.shape), t)
        with self.autocast():
            prediction = self.model.predict(sample.latents, t, self.conditioning(batch), self.sizes(batch))
        return (prediction.float() - sample.target.float()).square().flatten(1).mean(dim=1)

    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents (B, C, h, w), float32."""
        if batch.latents is not None:
            latents = batch.latents.to(self.device, non_blocking=True)
        else:
            assert batch.images is not None, "a batch holds latents or images"
            with torch.no_grad():
                latents = self.model.encode_images(batch.images)
        return self.model.latents.scaled(latents)

    def conditioning(self, batch: Batch) -> Conditioning:
        """What the denoiser reads of the captions."""
        if batch.text is not None:
            return batch.text.to(self.device, non_blocking=True)
        with torch.set_grad_enabled(self.trains_text_encoder and torch.is_grad_enabled()), self.autocast():
            return self.model.encode_text(batch.tokens, self.clip_skip)

    def sizes(self, batch: Batch) -> Tensor:
        """(B, 6), as in the batch."""
        return batch.sizes.to(self.device, non_blocking=True)
