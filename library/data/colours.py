"""Colour profiles: conversion of an image from the colour space of its ICC profile to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

# Colour space of a profile (ICC.1:2022, table 19) -> Pillow's mode for its pixels.
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
# Profiles named sRGB differ in their last digits. A profile that changes no level by more than this counts as sRGB.
SRGB_TOLERANCE = 3


class BadProfile(Exception):
    """The profile cannot be used. The message is the reason."""


def as_srgb(image: Image.Image) -> Image.Image | None:
    """The image as RGB in sRGB, without transparency; None if its pixels are sRGB already.

    Raises BadProfile for a damaged profile, or one that is for another kind of image.
    """
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    try:
        mode, transform = _transform(icc)
    except Exception as error:  # littlecms and Pillow raise many kinds for a damaged profile; ImportError without littlecms
        raise BadProfile(" ".join(str(error).split()) or type(error).__name__) from error
    if (mode in ("CMYK", "LAB") and image.mode != mode) or (mode == "L" and image.mode not in ("1", "L", "LA", "La")):
        raise BadProfile(f"it is one for {mode} images, and this is {image.mode}")
    if transform is None:
        return None
    from PIL import ImageCms

    return ImageCms.applyTransform(image.convert(mode), transform)


@lru_cache(maxsize=32)
def _transform(icc: bytes) -> tuple[str, Any | None]:
    """The mode of the pixels that a profile is for, and the transform to sRGB; None if the profile is as good as sRGB."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    mode = MODES[profile.profile.xcolor_space]
    transform = ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), mode, "RGB", renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,  # its cache is not thread-safe
    )  # fmt: skip
    if mode in ("RGB", "L"):
        probe = _probe(mode)
        changed = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int16) - np.asarray(probe.convert("RGB"))
        if np.abs(changed).max() <= SRGB_TOLERANCE:
            return mode, None
    return mode, transform


@lru_cache(maxsize=2)
def _probe(mode: str) -> Image.Image:
    """An image of colours spread over the RGB cube, or of all greys."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    return Image.fromarray(np.array(list(product(range(0, 256, 17), repeat=3)), dtype=np.uint8)[None])
