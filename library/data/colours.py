"""Colour profiles: an image's numbers changed so that sRGB shows the colours that its profile means."""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

# Colour spaces of profiles (ICC.1:2022, table 19), and the mode in which Pillow's pixels are in them.
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
# Profiles named sRGB differ in their last digits. An image that such a profile would change by at most so much stays as it is.
SAME = 3


class BadProfile(Exception):
    """The profile cannot be used. The message is the reason."""


def as_srgb(image: Image.Image) -> Image.Image | None:
    """The image without its transparency as RGB in sRGB; None if its numbers are sRGB already.

    Raises BadProfile for a profile that is damaged, or one of another kind of image.
    """
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    try:
        mode, transform = _transform(icc)
    except Exception as error:  # littlecms and Pillow raise all sorts of errors for a damaged one, ImportError where they lack it
        raise BadProfile(" ".join(str(error).split()) or type(error).__name__) from error
    if (mode in ("CMYK", "LAB") and image.mode != mode) or (mode == "L" and image.mode not in ("1", "L", "LA", "La")):
        raise BadProfile(f"it is one for {mode} images, and this is {image.mode}")
    if transform is None:
        return None
    from PIL import ImageCms

    return ImageCms.applyTransform(image.convert(mode), transform)


@lru_cache(maxsize=32)
def _transform(icc: bytes) -> tuple[str, Any | None]:
    """Mode of the pixels that a profile is for, and the transform of these to sRGB; None if it changes next to nothing."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    mode = MODES[profile.profile.xcolor_space]
    made = ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), mode, "RGB", renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,  # its cache is not for several threads
    )  # fmt: skip
    if mode in ("RGB", "L"):
        probe = _probe(mode)
        changed = np.asarray(ImageCms.applyTransform(probe, made), dtype=np.int16) - np.asarray(probe.convert("RGB"))
        if np.abs(changed).max() <= SAME:
            return mode, None
    return mode, made


@lru_cache(maxsize=2)
def _probe(mode: str) -> Image.Image:
    """Colours from all over the cube, or all greys."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    return Image.fromarray(np.array(list(product(range(0, 256, 17), repeat=3)), dtype=np.uint8)[None])
