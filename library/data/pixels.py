"""From a row of the table to pixels: read, decode, resize, crop."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.augment import face_crop, face_of, random_corner, shift_colours
from library.data.images import BadImage, decode_with_alpha, fit, within_memory_limit
from library.data.masks import decode_mask
from library.data.table import ImageTable
from library.errors import UserError


@dataclass(frozen=True)
class ImageCrop:
    """An image file and how it is resized and cropped; sizes are (width, height), corners (left, top), in pixels."""

    path: Path
    original_size: tuple[int, int]  # when the image was indexed
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    interpolation: str | None
    mask: Path | None = None
    alpha_mask: bool = False

    def sizes(self, mirrored: bool) -> tuple[int, ...]:
        """The row of `Batch.sizes`: original height and width, top and left of the crop, height and width of the crop.

        The left of a mirrored crop counts from the right side of the image.
        """
        left, top = self.corner
        if mirrored:
            left = self.resized[0] - self.size[0] - left
        return *self.original_size[::-1], top, left, *self.size[::-1]


def centre_crop(table: ImageTable, row: int) -> ImageCrop:
    """The crop at the centre, without augmentation."""
    return ImageCrop(
        path=table.path(row),
        original_size=tuple(table.sizes[row].tolist()),
        resized=tuple(table.resized[row].tolist()),
        corner=tuple(table.corner[row].tolist()),
        size=table.bucket_size(row),
        interpolation=table.interpolation(row),
        mask=table.mask(row),
        alpha_mask=table.config(row).alpha_mask,
    )


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); it was there when training began") from error


def decode_crop(crop: ImageCrop, content: bytes, mask: bytes | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (H, W, 3) uint8 and mask (H, W) uint8 of a crop; without a mask file or alpha channel the mask is None.

    `content` and `mask` are those of the files. Raises UserError, naming the file, if one cannot be decoded.
    """
    with within_memory_limit(crop.original_size):
        return _decode_crop(crop, content, mask)


def _decode_crop(crop: ImageCrop, content: bytes, mask: bytes | None) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        rgb, alpha = decode_with_alpha(content, str(crop.path))
    except BadImage as error:
        raise UserError(f"{crop.path}: {error}; mend or remove it, or give --on_bad_image=skip") from error
    if rgb.shape[1::-1] != crop.original_size:
        raise UserError(f"{crop.path} changed its size since training began; start again")
    pixels = fit(rgb, crop.resized, crop.corner, crop.size, crop.interpolation)
    values = alpha if crop.alpha_mask else None
    if mask is not None and crop.mask is not None:
        values = decode_mask(mask, crop.mask)
    # Area averaging, since a filter with overshoot would give a mask bright edges.
    return pixels, None if values is None else fit(values, crop.resized, crop.corner, crop.size, "area")


def read_mask(crop: ImageCrop) -> bytes | None:
    """The content of the mask's file."""
    return read_bytes(crop.mask) if crop.mask else None


def augmented(table: ImageTable, row: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray | None, ImageCrop]:
    """Pixels (H, W, 3) uint8, mask (H, W) uint8 and crop of an image, after random crop and colours (not the flip)."""
    config, crop = table.config(row), centre_crop(table, row)
    faces = config.face_crop_aug_range
    face = face_of(crop.path.stem) if faces else None
    resized, corner = crop.resized, crop.corner
    if face and faces:
        resized, corner = face_crop(face, crop.original_size, crop.size, faces, config.random_crop, rng)
    elif config.random_crop:
        corner = random_corner(resized, crop.size, rng)
    crop = replace(crop, resized=resized, corner=corner)
    pixels, mask = decode_crop(crop, read_bytes(crop.path), read_mask(crop))
    return (shift_colours(pixels, rng) if config.color_aug else pixels), mask, crop


def to_tensor(pixels: list[np.ndarray]) -> Tensor:
    """Images of one size, (H, W, 3) uint8 each, as (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)
