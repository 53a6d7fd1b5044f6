"""Where a row of the table becomes pixels: read, decode, resize, cut."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.augment import face_crop, face_of, random_corner, shift_colours
from library.data.images import BadImage, decode_with_alpha, fit, room_for
from library.data.masks import decode_mask
from library.data.table import ImageTable
from library.errors import UserError


@dataclass(frozen=True)
class Placed:
    """An image file and the cut that training makes of it; sizes and corners in pixels, (width, height), (left, top)."""

    path: Path
    seen: tuple[int, int]  # size of the image when it was indexed
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    interpolation: str | None
    mask: Path | None = None
    alpha_mask: bool = False

    def sizes(self, mirrored: bool) -> tuple[int, ...]:
        """Original height and width, what is cut off at top and left after resizing, height and width of the result.

        Of a mirrored image the other side is its left.
        """
        left, top = self.corner
        if mirrored:
            left = self.resized[0] - self.size[0] - left
        return *self.seen[::-1], top, left, *self.size[::-1]


def placed(table: ImageTable, row: int) -> Placed:
    """The cut in the middle, without any augmentation."""
    return Placed(
        path=table.path(row),
        seen=tuple(table.sizes[row].tolist()),
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


def cut(place: Placed, content: bytes, mask: bytes | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of a placed image, (H, W, 3) uint8, and its mask, (H, W) uint8, cut alike; None if all of it counts.

    `mask` is the content of the mask's file. Raises UserError, naming the file, if one cannot be decoded.
    """
    with room_for(place.seen):
        return _cut(place, content, mask)


def _cut(place: Placed, content: bytes, mask: bytes | None) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        rgb, alpha = decode_with_alpha(content, str(place.path))
    except BadImage as error:
        raise UserError(f"{place.path}: {error}; mend or remove it, or give --on_bad_image=skip") from error
    if rgb.shape[1::-1] != place.seen:
        raise UserError(f"{place.path} changed its size since training began; start again")
    pixels = fit(rgb, place.resized, place.corner, place.size, place.interpolation)
    values = alpha if place.alpha_mask else None
    if mask is not None and place.mask is not None:
        values = decode_mask(mask, place.mask)
    # Averaged areas, since a filter with overshoot would draw bright rims into a mask.
    return pixels, None if values is None else fit(values, place.resized, place.corner, place.size, "area")


def mask_bytes(place: Placed) -> bytes | None:
    """The content of the mask's file."""
    return read_bytes(place.mask) if place.mask else None


def augmented(table: ImageTable, row: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray | None, Placed]:
    """Pixels (H, W, 3) uint8 and mask (H, W) uint8 of an image, with its subset's random cut and colours (not the flip).

    Also the cut that was made.
    """
    config, place = table.config(row), placed(table, row)
    faces = config.face_crop_aug_range
    face = face_of(place.path.stem) if faces else None
    resized, corner = place.resized, place.corner
    if face and faces:
        resized, corner = face_crop(face, place.seen, place.size, faces, config.random_crop, rng)
    elif config.random_crop:
        corner = random_corner(resized, place.size, rng)
    place = replace(place, resized=resized, corner=corner)
    pixels, mask = cut(place, read_bytes(place.path), mask_bytes(place))
    return (shift_colours(pixels, rng) if config.color_aug else pixels), mask, place


def to_tensor(pixels: list[np.ndarray]) -> Tensor:
    """Images of one size, (H, W, 3) uint8 each, as (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)
