"""The VAE: its configuration, given or read from the shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from library.diffusion.process import Prediction
from library.imports import import_model_libraries
from library.models.family import SD_LATENTS, Config, LatentSpace, Part, Shapes
from library.models.modules import count_indices

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def vae_config(
    channels: tuple[int, ...], *, layers: int = 2, middle_attention: bool = True, latents: LatentSpace = SD_LATENTS
) -> Config:
    """Diffusers' configuration of a VAE with these channels per level; each level but the last halves the sides."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "latent_channels": latents.channels,
        "mid_block_add_attention": middle_attention,
        "sample_size": 512,
        "scaling_factor": latents.scale,
    } | ({"shift_factor": latents.shift} if latents.shift else {})


def read_vae_config(shapes: Shapes, prediction: Prediction = "epsilon", *, latents: LatentSpace = SD_LATENTS) -> Config:
    """The configuration of the VAE whose weights have these Diffusers names and shapes."""
    levels = count_indices(shapes, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    return vae_config(
        tuple(shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)),
        layers=count_indices(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        middle_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
        latents=latents,
    )


def empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """A VAE of this Diffusers configuration on the meta device."""
    import_model_libraries()
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


KL_VAE = Part(
    name="vae",
    role="vae",
    title="VAE",
    build=empty_vae,
    read_config=read_vae_config,
    library=("diffusers", "AutoencoderKL"),
    weight_files=("diffusion_pytorch_model",),
)
