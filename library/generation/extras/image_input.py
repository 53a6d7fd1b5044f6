"""Images to start from (img2img) and masks (in-painting)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from library.data.images import BadImage, decode, decode_values, size_of
from library.errors import UserError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from library.models.family import Model

SIDE_STEP = 32  # the sides of an image that gives the size are rounded down to a multiple of this


def source_size(path: Path) -> tuple[int, int]:
    """Width and height of an image that starts from this one: its own, each side rounded down to a multiple of 32."""
    try:
        width, height = size_of(path)
    except BadImage as error:
        raise UserError(f"--image_path {path}: {error}") from None
    if min(width, height) < SIDE_STEP:
        raise UserError(f"--image_path {path}: {width} x {height} pixels are too few; use a larger image or give --W and --H")
    return width - width % SIDE_STEP, height - height % SIDE_STEP


def load_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """An upright RGB image, stretched to `size` (width, height) if it has another one."""
    return resized(_opened(path, "--image_path", decode), size)


def _opened(path: Path, option: str, decode: Callable[[bytes], np.ndarray]) -> Image.Image:
    try:
        return Image.fromarray(decode(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror or error}") from None
    except BadImage as error:
        raise UserError(f"{option} {path}: {error}") from None


def load_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A grey image (mode L) of `size`: 255 is painted anew, 0 kept, and so is what was erased."""
    mask = resized(_opened(path, "--mask_path", decode_values), size).convert("L")
    if mask.getextrema()[1] == 0:
        raise UserError(f"--mask_path {path} is black all over, so nothing would be painted; white is what changes")
    return mask


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def to_pixels(images: list[Image.Image]) -> Tensor:
    """(B, 3, H, W), float32 in -1..1."""
    values = np.stack([np.asarray(image) for image in images]).astype(np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(0, 3, 1, 2)


def encode_images(model: Model, images: list[Image.Image], generators: list[Generator], at_once: int = 1) -> Tensor:
    """Latents (B, C, h, w) as the denoiser knows them, float32: each a sample of the posterior drawn from its own generator."""
    parts = []
    for start in range(0, len(images), at_once):
        chosen = slice(start, start + at_once)
        parts.append(model.encode_images(to_pixels(images[chosen]), generators[chosen]))
    # The VAE returns the memory layout of the pixels; the denoiser would keep it, and round otherwise.
    result = model.latents.scaled(torch.cat(parts)).contiguous()
    if not result.isfinite().all():
        dtype = next(model.vae.parameters()).dtype
        raise UserError(f"the VAE overflows in {dtype} on the image given; add --no_half_vae or give another --vae")
    return result


def run_steps(steps: int, strength: float) -> int:
    """How many of `steps` are run from an image: floor(steps * strength), as Diffusers counts."""
    return min(int(steps * strength), steps)


def latent_masks(masks: list[Image.Image], height: int, width: int) -> Tensor:
    """(B, 1, h, w), float32: the share of each latent's pixels that is painted anew."""
    small = [np.asarray(mask.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255 for mask in masks]
    return torch.from_numpy(np.stack(small)).unsqueeze(1)


def keep_outside(
    scheduler: SchedulerMixin, clean: Tensor, noise: Tensor, masks: Tensor
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """For `denoise`: after each step, what the masks keep is the source's latents again with the noise of the next timestep."""

    def after_step(latents: Tensor, following: Tensor | None) -> Tensor:
        source = clean if following is None else scheduler.add_noise(clean, noise, following.repeat(len(clean)))
        return (1 - masks) * source + masks * latents

    return after_step


def composite(painted: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """The painted image where the mask is white; where it is black the source's very pixels."""
    return Image.composite(painted, resized(source, painted.size), mask.resize(painted.size, Image.Resampling.BILINEAR))
