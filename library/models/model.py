"""What the rest of the suite asks of a Stable Diffusion model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.diffusion.process import NoiseProcess
from library.models.clip import encode_text
from library.models.loading import load_stable_diffusion, load_vae
from library.models.parts import StableDiffusion
from library.models.saving import save_stable_diffusion

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

__all__ = [
    "StableDiffusion",
    "decode_latents",
    "encode_image",
    "encode_text",
    "evaluating",
    "load_stable_diffusion",
    "load_vae",
    "noise_process",
    "pixels_per_latent",
    "predict_noise",
    "save_stable_diffusion",
    "vae_fingerprint",
]


def encode_image(vae: AutoencoderKL, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents (B, 4, H/8, W/8) of images (B, 3, H, W) in -1..1: one sample of the posterior, not scaled by 0.18215."""
    return vae.encode(images).latent_dist.sample(generator)


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in -1..1 of latents (B, 4, H/8, W/8) as the U-Net knows them, that is, scaled by 0.18215."""
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def predict_noise(unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """What the U-Net sees in `noisy` (B, 4, h, w): the noise, or with v-parameterization the velocity.

    `timesteps` (B,) are 0..999; `context` (B, N, width) comes from `encode_text`.
    """
    return unet(noisy, timesteps, encoder_hidden_states=context).sample


def noise_process(model: StableDiffusion, zero_terminal_snr: bool = False) -> NoiseProcess:
    """How latents of this model are noised, and what it predicts."""
    return NoiseProcess("v" if model.v_parameterization else "epsilon", zero_terminal_snr)


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """How many pixels a side of one latent stands for: 8 in Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put the modules into evaluation mode, without dropout; afterwards every part of them has the mode that it had."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """64 hex digits over the VAE's weights and their dtype, to tell whether cached latents are its own."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
