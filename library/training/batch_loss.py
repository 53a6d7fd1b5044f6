"""From a batch to its loss: latents, text, noise and the model's prediction. All that asks the model while training is here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from library.data.dataset import Batch
from library.data.text_cache import TextCache
from library.diffusion.loss import Objective
from library.models.clip import encode_text
from library.models.model import StableDiffusion, encode_image, predict_noise


class BatchLoss:
    """The diffusion loss of batches, on the model's device.

    texts: embeddings of all captions, if they were encoded before. autocast: the context of the run's arithmetic.
    """

    def __init__(
        self, model: StableDiffusion, objective: Objective, texts: TextCache | None, *, device: torch.device,
        autocast: Callable[[], AbstractContextManager], trains_text_encoder: bool, clip_skip: int | None,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.texts, self.device, self.autocast = model, objective, texts, device, autocast
        self.trains_text_encoder, self.clip_skip = trains_text_encoder, clip_skip

    def __call__(self, batch: Batch) -> Tensor:
        """The loss to train with, a float32 scalar."""
        latents, context = self.latents(batch), self.context(batch)
        noised = self.objective.noised(latents)
        with self.autocast():
            prediction = predict_noise(self.model.unet, noised.noisy, noised.t, context)
        masks = None if batch.masks is None else batch.masks.to(latents.device, non_blocking=True)
        losses = self.objective.losses(prediction, noised, masks)
        return (losses * batch.loss_weights.to(losses.device, non_blocking=True)).mean()

    def unweighted(self, batch: Batch, noise_of: Callable[[torch.Size], Tensor], t: Tensor) -> Tensor:
        """Squared errors (B,) at given noise and timesteps (B,), without any weights, so that runs can be compared."""
        latents = self.latents(batch)
        noised = self.objective.at(latents, noise_of(latents.shape), t)
        with self.autocast():
            prediction = predict_noise(self.model.unet, noised.noisy, t, self.context(batch))
        return (prediction.float() - noised.target.float()).square().flatten(1).mean(dim=1)

    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents (B, 4, h, w), float32."""
        vae = self.model.vae
        if batch.latents is not None:
            latents = batch.latents.to(self.device, non_blocking=True)
        else:
            with torch.no_grad():
                latents = encode_image(vae, batch.images.to(self.device, vae.dtype, non_blocking=True)).float()
        return latents * vae.config.scaling_factor

    def context(self, batch: Batch) -> Tensor:
        """Embeddings of the captions (B, N, width)."""
        if self.texts is not None:
            return self.texts.lookup(batch.captions).to(self.device, non_blocking=True)
        weights = None if batch.token_weights is None else batch.token_weights.to(self.device, non_blocking=True)
        with torch.set_grad_enabled(self.trains_text_encoder and torch.is_grad_enabled()), self.autocast():
            ids = batch.input_ids.to(self.device, non_blocking=True)
            return encode_text(self.model.text_encoder, ids, self.clip_skip, weights)
