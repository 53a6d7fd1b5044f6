"""A tiny Stable Diffusion with random weights and the block structure of the real one, for tests and the demo."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from library.models.architecture import LATENT_CHANNELS, text_config, unet_config, vae_config
from library.models.clip import inner_text_model, load_tokenizer
from library.models.parts import StableDiffusion, empty_text_encoder, empty_unet, empty_vae, fill, ready

LATENT_SPREAD = 5.5  # standard deviation of real latents, so that 0.18215 brings these to about 1 too
LATENT_LOG_VARIANCE = -12.0  # real posteriors are narrow: a sample is close to its mean


def small_stable_diffusion(
    seed: int = 0,
    v2: bool = False,
    v_parameterization: bool = False,
    *,
    unet_channels: tuple[int, ...] = (32, 64, 96, 96),
    vae_channels: tuple[int, ...] = (32, 32, 64, 64),
    text_width: int = 64,
    text_layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> StableDiffusion:
    """A model of SD 1's (or 2's) blocks, names and vocabulary, but narrow; channels are multiples of 32 (group norm).

    The weights are uniform numbers from a seeded generator, which are the same on every machine, and scaled so that signals keep
    their size: predictions depend on picture, timestep and text. The VAE's 8 x 8 pixels to a latent are as in the real one.
    """
    generator = torch.Generator().manual_seed(seed)
    unet = empty_unet(unet_config(unet_channels, context_width=text_width, v2=v2, v_parameterization=v_parameterization))
    vae = empty_vae(vae_config(vae_channels, layers=1))
    text_encoder = empty_text_encoder(text_config(text_width, text_layers, v2=v2))
    for module in (unet, vae, text_encoder):
        fill(module, _random_weights(inner_text_model(module), generator, dtype), "the small model")
        ready(module)
    _narrow_posterior(vae)
    return StableDiffusion(load_tokenizer(v2), text_encoder, vae, unet, v2, v_parameterization, f"small seed {seed}")


def _random_weights(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for name, value in module.state_dict().items():
        if not name.endswith("position_ids"):
            weights[name] = _random_weight(name, value.shape, generator).to(dtype)
    return weights


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms do nothing, biases are small, embeddings have deviation 0.5, other weights 1 / sqrt(inputs)."""
    if len(shape) == 1:
        if name.endswith("weight"):
            return torch.ones(shape)
        return torch.zeros(shape) if "norm" in name else _uniform(shape, 0.02, generator)
    deviation = 0.5 if "embeddings." in name else 1 / math.sqrt(math.prod(shape[1:]))
    return _uniform(shape, deviation, generator)


def _uniform(shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    """Uniform numbers of mean 0. Unlike normal ones they take no logarithm, whose last bit differs between processors."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * (deviation * math.sqrt(3))


def _narrow_posterior(vae: Any) -> None:
    """Make the VAE encode as a trained one does: latents of the usual spread and next to no noise."""
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    with torch.no_grad():
        weight[:LATENT_CHANNELS] *= LATENT_SPREAD
        weight[LATENT_CHANNELS:] = 0
        bias[LATENT_CHANNELS:] = LATENT_LOG_VARIANCE
        vae.post_quant_conv.weight /= LATENT_SPREAD
