"""A tiny Stable Diffusion with random weights and the block structure of the real one, for tests and the demo."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.process import Prediction
from library.models import sdxl
from library.models.clip import load_tokenizer, text_config
from library.models.family import SD_LATENTS, Config, Family, Model
from library.models.loading import Header
from library.models.modules import fill, for_inference, weights_of
from library.models.registry import by_name
from library.models.unet import LATENT_CHANNELS, SIZE_WIDTH, SIZES, unet_config
from library.models.vae import vae_config

SD2_UNET: dict[str, Any] = {"heads": None, "linear_projection": True, "upcast_attention": True}
SD2_SIZES: dict[Prediction, int] = {"epsilon": 64, "v": 96}  # latents at the resolution that a model was trained for
LATENT_SPREAD = 5.5  # standard deviation of SD's real latents, which the scale 0.18215 brings to about 1
LATENT_LOG_VARIANCE = -12.0  # real posteriors are narrow: a sample is close to its mean


def small_stable_diffusion(
    seed: int = 0,
    family: str = "sd1",
    v_parameterization: bool = False,
    *,
    unet_channels: tuple[int, ...] = (32, 64, 96, 96),
    vae_channels: tuple[int, ...] = (32, 32, 64, 64),
    text_width: int = 64,
    text_layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model of SD 1's (`sd1`) or 2's (`sd2`) blocks, names and vocabulary, but narrow; channels are multiples of 32.

    The weights are uniform random numbers from a seeded generator, the same on every machine, scaled so that activations keep
    their size: predictions depend on image, timestep and text. The VAE has 8 x 8 pixels for each latent, as the real one.
    """
    prediction: Prediction = "v" if v_parameterization else "epsilon"
    unet_of_family = {"sd1": {}, "sd2": {**SD2_UNET, "sample_size": SD2_SIZES[prediction]}}
    activations = {"sd1": "quick_gelu", "sd2": "gelu"}
    configs = {
        "unet": unet_config(unet_channels, context_width=text_width, **unet_of_family[family]),
        "vae": vae_config(vae_channels, layers=1),
        "text_encoder": text_config(text_width, text_layers, activation=activations[family]),
    }
    return small_model(by_name(family), configs, seed, prediction, dtype)


def small_sdxl(
    seed: int = 0,
    v_parameterization: bool = False,
    *,
    unet_channels: tuple[int, ...] = (32, 64, 64),
    depths: tuple[int, ...] = (1, 1, 2),
    vae_channels: tuple[int, ...] = (32, 32, 64, 64),
    text_width: int = 64,
    text_layers: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A small SDXL in the same way: two text encoders, three levels (the first without attention), sizes as conditioning.

    `depths`: transformer blocks by level.
    """
    configs = {
        "unet": unet_config(
            unet_channels, context_width=2 * text_width, heads=None, sample_size=16, linear_projection=True,
            attention=(False, True, True), depths={"transformer_layers_per_block": list(depths)},
            vector_width=text_width + SIZES * SIZE_WIDTH,
        ),
        "vae": vae_config(vae_channels, layers=1, latents=sdxl.LATENTS),
        "text_encoder": text_config(text_width, text_layers),
        "text_encoder_2": text_config(text_width, text_layers, activation="gelu"),
    }  # fmt: skip
    return small_model(sdxl.FAMILY, configs, seed, "v" if v_parameterization else "epsilon", dtype)


def small_model(
    family: Family,
    configs: dict[str, Config],
    seed: int = 0,
    prediction: Prediction = "epsilon",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model of any family with parts of these configurations, and random weights as above."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part in family.parts:
        parts[part.name] = module = part.build(configs[part.name])
        fill(module, _random_weights(module, generator, dtype), "the small model", part.title)
        for_inference(module)
        if part.role == "vae":
            _narrow_posterior(module)
    tokenizers = [load_tokenizer(padding) for padding in family.text.paddings]
    return Model(family, parts, tokenizers, prediction, f"small seed {seed}")


def sd15_configs() -> dict[str, Config]:
    """The full-size SD 1.5 as configurations `unet`, `vae` and `text_encoder`."""
    return {
        "unet": unet_config((320, 640, 1280, 1280), context_width=768),
        "vae": vae_config((128, 256, 512, 512)),
        "text_encoder": text_config(768, 12),
    }


def sd2_configs() -> dict[str, Config]:
    """The full-size SD 2.x that predicts velocity; its text encoder has 23 of OpenCLIP's 24 layers."""
    return {
        "unet": unet_config((320, 640, 1280, 1280), context_width=1024, sample_size=SD2_SIZES["v"], **SD2_UNET),
        "vae": vae_config((128, 256, 512, 512)),
        "text_encoder": text_config(1024, 23, activation="gelu"),
    }


def sdxl_configs() -> dict[str, Config]:
    """The full-size SDXL."""
    return {
        "unet": unet_config(
            (320, 640, 1280), context_width=2048, heads=None, sample_size=128, linear_projection=True,
            attention=(False, True, True), depths={"transformer_layers_per_block": [1, 2, 10]}, vector_width=2816,
        ),
        "vae": vae_config((128, 256, 512, 512), latents=sdxl.LATENTS),
        "text_encoder": text_config(768, 12),
        "text_encoder_2": text_config(1280, 32, activation="gelu"),
    }  # fmt: skip


def _random_weights(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for name, value in weights_of(module).items():
        weights[name] = _random_weight(name, value.shape, generator).to(dtype)
    return weights


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms are the identity, biases small, embeddings of deviation 0.5, other weights of deviation 1 / sqrt(inputs)."""
    if len(shape) == 1:
        if name.endswith("weight"):
            return torch.ones(shape)
        return torch.zeros(shape) if "norm" in name else _uniform(shape, 0.02, generator)
    deviation = 0.5 if "embeddings." in name else 1 / math.sqrt(math.prod(shape[1:]))
    return _uniform(shape, deviation, generator)


def _uniform(shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    """Uniform random numbers of mean 0. Normal ones would need a logarithm, whose last bit differs between processors."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * (deviation * math.sqrt(3))


def _narrow_posterior(vae: Any) -> None:
    """Make the VAE encode like a trained one: latents of the usual deviation, and almost no noise."""
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    spread = LATENT_SPREAD * SD_LATENTS.scale / vae.config.scaling_factor
    with torch.no_grad():
        weight[:LATENT_CHANNELS] *= spread
        weight[LATENT_CHANNELS:] = 0
        bias[LATENT_CHANNELS:] = LATENT_LOG_VARIANCE
        vae.post_quant_conv.weight /= spread


def header_of(model: Model) -> Header:
    """The header that a file of this model has."""
    return Header(model.family, {name: _shapes(module) for name, module in model.parts.items()})


def full_size_configs(family: str) -> dict[str, Config]:
    """The configurations of a full-size SD 1.5 (`sd1`), SD 2.x (`sd2`) or SDXL (`sdxl`)."""
    return {"sd1": sd15_configs, "sd2": sd2_configs, "sdxl": sdxl_configs}[family]()


@cache
def full_size_header(family: str = "sd1") -> Header:
    """The header of a full-size SD 1.5 (`sd1`), SD 2.x (`sd2`) or SDXL (`sdxl`), as of a file."""
    configs = full_size_configs(family)
    parts = by_name(family).parts
    return Header(by_name(family), {part.name: _shapes(part.build(configs[part.name])) for part in parts})


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights_of(module).items()}
