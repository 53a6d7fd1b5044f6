"""Stable Diffusion XL: two text encoders, a pooled text vector, and a U-Net conditioned on the sizes of images.

Distilled relatives (SSD-1B, Vega, KOALA) have the same parts with fewer blocks, which are read from the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from library.diffusion.process import NoiseProcess
from library.formats.families import SDXL
from library.formats.names import renamed, unet_layout, unet_paths
from library.models import clip, sd1, unet
from library.models.family import Conditioning, Config, Family, LatentSpace, Part, TextRules
from library.models.modules import weights_of
from library.models.vae import KL_VAE, read_vae_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from library.models.family import Model, Tokens

LATENTS = LatentSpace(scale=0.13025)
LAYER = -2  # of both text encoders: the last but one

log = logging.getLogger(__name__)


def predict(model: Model, noisy: Tensor, t: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
    """The U-Net attends to the text, and adds the pooled text and the sizes to its timestep."""
    added = {"text_embeds": conditioning["pooled"], "time_ids": sizes}
    return model.denoiser(noisy, t, encoder_hidden_states=conditioning["context"], added_cond_kwargs=added).sample


def encode(model: Model, tokens: Tokens, clip_skip: int | None = None) -> Conditioning:
    """`context` (B, chunks * 75 + 2, width of both): the last but one layer of each encoder without the final norm.

    `pooled` (B, width of the second): the second encoder's projection of the first end token of the first chunk. `clip_skip` has
    no effect.
    """
    first = clip.encode_layers(model.text_encoders[0], tokens["ids"])
    second = clip.encode_layers(model.text_encoders[1], tokens["ids_2"])
    contexts = [
        clip.join_states(first.hidden_states[LAYER], tokens["ids"], tokens.get("weights")),
        clip.join_states(second.hidden_states[LAYER], tokens["ids_2"], tokens.get("weights_2")),
    ]
    pooled = clip.pooled_state(model.text_encoders[1], second.last_hidden_state, tokens["ids_2"])
    return Conditioning({"context": torch.cat(contexts, dim=-1), "pooled": pooled})


def warn_of_clip_skip(clip_skip: int | None) -> None:
    """Warn that --clip_skip has no effect, except for 2, by which model pages mean the layer that is used anyway."""
    if clip_skip is not None and clip_skip != -LAYER:
        log.warning("--clip_skip %d has no effect: SDXL always reads the layer before the last of its text encoders", clip_skip)


def text_shapes(model: Model, tokens: int) -> dict[str, tuple[int, ...]]:
    config = model.denoiser.config
    pooled = config.projection_class_embeddings_input_dim - unet.SIZES * config.addition_time_embed_dim
    return {"context": (tokens, config.cross_attention_dim), "pooled": (pooled,)}


def paths_in_files(module: nn.Module) -> Callable[[str], str | None]:
    """LoRA files name the U-Net's layers as its checkpoints do."""
    paths = unet_paths(unet_layout(weights_of(module)))
    return lambda path: renamed(path, paths)


def owns_folder(configs: Mapping[str, Config]) -> bool:
    """Whether a folder has both text encoders."""
    return {"text_encoder", "text_encoder_2"} <= set(configs)


UNET = Part(
    name="unet",
    role="denoiser",
    title="U-Net",
    build=unet.empty_unet,
    read_config=lambda shapes, prediction: unet.read_unet_config(shapes, heads=None, sample_size=128),
    library=("diffusers", "UNet2DConditionModel"),
    weight_files=("diffusion_pytorch_model",),
    file_paths=paths_in_files,
)
VAE = replace(KL_VAE, read_config=partial(read_vae_config, latents=LATENTS))
TEXT_ENCODER = replace(sd1.text_part("quick_gelu"), title="first text encoder")
TEXT_ENCODER_2 = replace(
    sd1.text_part("gelu"),
    name="text_encoder_2",
    title="second text encoder",
    build=clip.empty_pooling_text_encoder,
    library=("transformers", "CLIPTextModelWithProjection"),
)

# Its published scheduler counts 1, 21, 41, .. with every sampler.
PROCESS = partial(NoiseProcess, spacing="leading", steps_offset=1)

FAMILY = Family(
    name="sdxl",
    title=SDXL.title,
    parts=(UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2),
    layout=SDXL.layout,
    pipeline="StableDiffusionXLPipeline",
    owns_folder=owns_folder,
    text=TextRules(("<|endoftext|>", "!"), encode, text_shapes, warn_of_clip_skip, unread=lambda clip_skip: (1, 0)),
    predict=predict,
    records=SDXL.records,
    latents=LATENTS,
    side_step=32,
    half_vae="madebyollin/sdxl-vae-fp16-fix",
    process=PROCESS,
)
