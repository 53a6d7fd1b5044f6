"""Stable Diffusion 2.x: as 1.x, but with 23 of the 24 layers of OpenCLIP's text encoder, and heads of 64 channels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from library.formats.families import SD2
from library.models import sd1
from library.models.clip import last_layer_conditioning, layers_behind
from library.models.family import TextRules
from library.models.vae import KL_VAE

FAMILY = replace(
    sd1.FAMILY,
    name="sd2",
    title=SD2.title,
    parts=(
        sd1.unet_part(heads=None, upcast_attention=True, sizes={"epsilon": 64, "v": 96}),  # 2.1 overflows in fp16 without upcast
        KL_VAE,
        sd1.text_part("gelu"),
    ),
    layout=SD2.layout,
    owns_folder=partial(sd1.has_activation, "gelu"),
    text=TextRules(("!",), last_layer_conditioning, sd1.context_shape, unread=layers_behind),
    records=SD2.records,
)
