"""Small copies of images in a page's folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from library.files import unflushed_write

QUALITY = 86
WITHOUT_LOSS = 160 * 160  # pixels: lossy compression saves little on smaller images, and shows


def save_small_copy(image: Image.Image, path: Path, longest: int) -> None:
    """Write an image as WebP, its longer side at most `longest` pixels; RGBA stays so.

    `path` ends in .webp; its folder is there.
    """
    small = image.convert("RGBA" if image.mode == "RGBA" else "RGB")
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=2.0)
    with unflushed_write(path) as temporary:
        small.save(temporary, "WEBP", quality=QUALITY, method=2, lossless=small.width * small.height <= WITHOUT_LOSS)
