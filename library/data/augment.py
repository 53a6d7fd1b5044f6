"""Random changes to an image at each use. All random numbers come from the generator that is passed in."""

from __future__ import annotations

import math
import random

import cv2
import numpy as np

COLOUR_PROBABILITY = 0.33
HUE_SHIFT = 8.0  # in units of 2 degrees, as OpenCV's 8-bit hue has them
GAMMA = (0.95, 1.05)

Size = tuple[int, int]  # width, height, or left, top


def random_corner(resized: Size, size: Size, rng: random.Random) -> Size:
    """The corner (left, top) of a random crop of `size` from an image of `resized`."""
    return rng.randint(0, resized[0] - size[0]), rng.randint(0, resized[1] - size[1])


def shift_colours(rgb: np.ndarray, rng: random.Random) -> np.ndarray:
    """With COLOUR_PROBABILITY, shift the hue a little or apply a mild gamma; (H, W, 3) uint8 to the same."""
    if rng.random() >= COLOUR_PROBABILITY:
        return rgb
    values: np.ndarray = rgb.astype(np.float32) / 255
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(values, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + 2 * rng.uniform(-HUE_SHIFT, HUE_SHIFT)) % 360  # OpenCV's float hue is in degrees
        values = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    else:
        values = values ** rng.uniform(*GAMMA)
    return np.rint(values * 255).clip(0, 255).astype(np.uint8)


def face_of(stem: str) -> tuple[int, int, int, int] | None:
    """Face centre and size (cx, cy, w, h) from a file name "..._cx_cy_w_h", as face croppers write it; None without one."""
    parts = stem.split("_")
    if len(parts) < 5 or not all(part.isdecimal() for part in parts[-4:]):
        return None
    x, y, width, height = (int(part) for part in parts[-4:])
    return (x, y, width, height) if x > 0 and max(width, height) > 0 else None


def face_crop(
    face: tuple[int, int, int, int],
    image: Size,
    size: Size,
    factors: tuple[float, float],
    random_crop: bool,
    rng: random.Random,
) -> tuple[Size, Size]:
    """A crop of `size` around a face: the size to resize the image to, and the corner (left, top) of the crop.

    `factors` (a, b): the shorter side of the crop becomes a to b times as long as the face. The image is enlarged only if it
    would not cover the crop otherwise.
    """
    low, high = factors
    shorter, face_size = min(size), max(face[2:])
    cover = max(size[0] / image[0], size[1] / image[1])
    least = min(1, max(cover, shorter / (face_size * high)))
    most = min(1, max(least, shorter / (face_size * low)))
    scale = max(cover, least if least >= most else rng.uniform(least, most))
    resized = (max(size[0], math.floor(image[0] * scale + 0.5)), max(size[1], math.floor(image[1] * scale + 0.5)))
    centre = [math.floor(position * scale + 0.5) for position in face[:2]]

    corner = [0, 0]
    for axis in (1, 0):
        position = centre[axis]
        if random_crop:
            reach = max(resized[axis] - position, position)
            position += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif low != high and face_size > shorter // 10 and face_size >= 40:
            position += rng.randint(-face_size // 20, face_size // 20)
        corner[axis] = min(max(position - size[axis] // 2, 0), resized[axis] - size[axis])
    return resized, (corner[0], corner[1])
