"""From latents to images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.generation.extras.image_input import composite
from library.generation.pipeline.image_state import ImageState

if TYPE_CHECKING:
    from library.models.family import Model


def note_broken(states: list[ImageState]) -> None:
    """Those whose latents are not finite get an error."""
    for state in states:
        if state.latents is not None and not state.latents.isfinite().all():
            state.error = UserError(
                f"{state} gave NaN or infinite latents: the U-Net overflows or holds broken weights; "
                "use bf16 or full precision instead of fp16, or check the model and the network's weights and strength"
            )


def decode_images(states: list[ImageState], model: Model, at_once: int) -> None:
    """Give every state the image of its latents, `at_once` at a time; one whose pixels are not finite gets an error."""
    for start in range(0, len(states), at_once):
        together = states[start : start + at_once]
        try:
            _decode(together, model)
        except torch.cuda.OutOfMemoryError:
            if len(together) == 1:
                raise
            for state in together:  # the denoising was the long part; one by one takes less memory
                _decode([state], model)


def _decode(states: list[ImageState], model: Model) -> None:
    weight = next(model.vae.parameters())
    latents = torch.stack([state.latents for state in states if state.latents is not None])
    for state, pixels in zip(states, model.decode(latents), strict=True):
        if pixels.isfinite().all():
            image = to_image(pixels)
            if state.mask is not None and state.source is not None:
                image = composite(image, state.source, state.mask)
            state.image = image
        else:
            fitting = model.family.half_vae
            other = f"--vae={fitting}, which is made for 16 bits" if fitting else "another --vae"
            reason = f"overflows in {weight.dtype}; keep it in float32 (--no_half_vae) or give {other}"
            if weight.dtype == torch.float32:
                reason = "overflows or holds broken weights; give another --vae, or check the model"
            state.error = UserError(f"{state} gave a black image: the VAE {reason}")


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to an image; values outside are clipped."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
