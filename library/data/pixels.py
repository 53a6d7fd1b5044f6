"""Where a row of the table becomes pixels: read, decode, resize, cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.augment import face_crop, face_of, random_corner, shift_colours
from library.data.images import BadPicture, decode, fit
from library.data.table import PictureTable
from library.errors import UserError


@dataclass(frozen=True)
class Placed:
    """A picture file and the cut that training makes of it; sizes and corners in pixels, (width, height), (left, top)."""

    path: Path
    seen: tuple[int, int]  # size of the picture when it was indexed
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    interpolation: str | None


def placed(table: PictureTable, row: int) -> Placed:
    """The cut in the middle, without any augmentation."""
    return Placed(
        path=table.path(row),
        seen=tuple(table.sizes[row].tolist()),
        resized=tuple(table.resized[row].tolist()),
        corner=tuple(table.corner[row].tolist()),
        size=table.bucket_size(row),
        interpolation=table.interpolation(row),
    )


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); it was there when training began") from error


def cut(place: Placed, content: bytes) -> np.ndarray:
    """Pixels of a placed picture, (H, W, 3) uint8. Raises UserError, naming the file, if it cannot be decoded."""
    try:
        rgb = decode(content)
    except BadPicture as error:
        raise UserError(f"{place.path}: {error}; mend or remove it, or give --on_bad_image=skip") from error
    if rgb.shape[1::-1] != place.seen:
        raise UserError(f"{place.path} changed its size since training began; start again")
    return fit(rgb, place.resized, place.corner, place.size, place.interpolation)


def augmented(table: PictureTable, row: int, rng: random.Random) -> np.ndarray:
    """Pixels of a picture, (H, W, 3) uint8, with its subset's random cut and colours (not the flip)."""
    config, place = table.config(row), placed(table, row)
    face = face_of(place.path.stem) if config.face_crop_aug_range else None
    resized, corner = place.resized, place.corner
    if face:
        resized, corner = face_crop(face, place.seen, place.size, config.face_crop_aug_range, config.random_crop, rng)
    elif config.random_crop:
        corner = random_corner(resized, place.size, rng)
    place = Placed(place.path, place.seen, resized, corner, place.size, place.interpolation)
    pixels = cut(place, read_bytes(place.path))
    return shift_colours(pixels, rng) if config.color_aug else pixels


def to_tensor(pixels: list[np.ndarray]) -> Tensor:
    """Pictures of one size, (H, W, 3) uint8 each, as (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)
