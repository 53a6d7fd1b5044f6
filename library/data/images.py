"""One image: from the bytes of a file to RGB pixels of the training size.

The network gets what a viewer shows: EXIF rotation is applied, colours are converted from the image's profile to sRGB,
transparent parts become white, 16-bit grey is scaled to 8 bits, and an animation gives its first frame.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from library.data.colours import BadProfile, as_srgb
from library.errors import one_line
from library.freed_memory import give_back_freed_memory

log = logging.getLogger(__name__)

# Loader processes and threads work in parallel already; OpenCV's own threads would also hang after a fork.
cv2.setNumThreads(1)

# MAX_PIXELS replaces Pillow's limit, which a scan of 200 megapixels exceeds; its error names the image.
Image.MAX_IMAGE_PIXELS = None
# Pillow's warnings, about damaged EXIF data for example, name no file. Whatever makes an image unusable raises an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")
MAX_PIXELS = 1_000_000_000
MAX_PIXELS_AT_ONCE = 100_000_000  # decoded at the same time by all threads of a process
LARGE_IMAGE = 16_000_000  # pixels
EMPTY = "the file is empty (0 bytes)"
# Image generators write whole workflows into PNG text chunks; Pillow refuses those over 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28

# A PNG text in what training draws (plots, samples, sheets). --output_dir may be the data folder, and these are no data.
OWN_IMAGE = "sd-lora-suite drew"

ORIENTATION_TAG = 0x0112
TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PILLOW_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


class BadImage(Exception):
    """The file cannot be used as an image. The message is the reason, without the file's name."""


def readable_formats() -> list[str]:
    """Pillow formats to try on a file, whatever its suffix. EPS and the like are not among them: they start other programs."""
    for plug_in in ("pillow_avif", "pillow_jxl"):  # they register themselves with Pillow
        if importlib.util.find_spec(plug_in):
            importlib.import_module(plug_in)
    Image.init()
    wanted = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JXL", "JPEG2000", "PPM", "ICO")
    return [name for name in wanted if name in Image.OPEN]


FORMATS = readable_formats()


def own_mark(kind: str) -> PngImagePlugin.PngInfo:
    """Pillow's `pnginfo` that marks an image as drawn by training. kind: such as "sample"."""
    info = PngImagePlugin.PngInfo()
    info.add_text(OWN_IMAGE, kind)
    return info


def open_image(source: Path | io.BytesIO) -> Image.Image:
    """Open an image; only its header is read. Raises BadImage."""
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("no image, or cut off in its header") from error
    except Exception as error:  # the decoders raise many kinds of errors for a damaged file
        raise BadImage(getattr(error, "strerror", None) or one_line(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000:,} million; make it smaller")
    return image


def exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """How to transpose the image so that it is upright, by the EXIF data before its pixels; None if it is upright."""
    if image.format == "TIFF":  # Pillow transposes these by itself
        return None
    try:
        # Not image.getexif(): for a PNG that would decode the pixels to find EXIF data after them.
        orientation = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data raises many kinds of errors, and the image is usable without it
        return None
    return TRANSPOSE_BY_ORIENTATION.get(orientation)


def _webp_size(path: Path) -> tuple[int, int] | None:
    """Size of a complete WebP file without EXIF or XMP data, else None. Pillow would read the whole file for it.

    Layout: RFC 9649, sections 2.4 to 2.7.
    """
    with open(path, "rb") as file:
        head = file.read(30)
        length = file.seek(0, io.SEEK_END)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP" or int.from_bytes(head[4:8], "little") + 8 > length:
        return None
    kind = head[12:16]
    if kind == b"VP8X" and not head[20] & 0b1100:
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of the upright image, from the file's header. Raises BadImage."""
    return header_of(path)[0]


def header_of(path: Path) -> tuple[tuple[int, int], bool]:
    """Size of the upright image, and whether training drew it (a plot, a sample, a sheet). Raises BadImage."""
    try:
        size = _webp_size(path) if path.suffix.lower() == ".webp" else None
        if size is not None:
            return size, False
        if not path.stat().st_size:
            raise BadImage(EMPTY)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    with open_image(path) as image:
        width, height = image.size
        swaps_sides = exif_transpose(image) in (
            Image.Transpose.TRANSPOSE,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
            Image.Transpose.ROTATE_270,
        )
        return (height, width) if swaps_sides else (width, height), OWN_IMAGE in image.info


def to_rgb(image: Image.Image, background: str = "white", file: str = "") -> Image.Image:
    """8-bit sRGB: transparent parts on white, 16-bit grey scaled rather than clipped.

    background: another colour for transparent parts. file: its name, for the warning about an unusable profile.
    """
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is what older Pillow gives for a 16-bit PNG
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        scaled = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        scaled.info = {"icc_profile": image.info.get("icc_profile")}
        image = scaled
    if image.mode == "F":
        raise BadImage("pixels are floating-point numbers; save it as PNG")
    try:
        rgb = as_srgb(image)
    except BadProfile as error:
        _warn_of_bad_profile(file, str(error))
        rgb = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgb is not None:
            rgb.putalpha(rgba.getchannel("A"))
            rgba = rgb
        return Image.alpha_composite(Image.new("RGBA", image.size, background), rgba).convert("RGB")
    return image.convert("RGB") if rgb is None else rgb


@lru_cache(maxsize=4096)
def _warn_of_bad_profile(file: str, reason: str) -> None:
    """Warn once for each file, since it is decoded again in every epoch."""
    log.warning("%s: its colour profile is not used (%s), its colours are taken for sRGB", file or "an image", reason)


def decode(content: bytes, file: str = "") -> np.ndarray:
    """The upright image in the bytes of a file: (H, W, 3) uint8, sRGB. Raises BadImage. file: its name, for warnings."""
    return decode_with_alpha(content, file)[0]


def decode_values(content: bytes) -> np.ndarray:
    """The upright image of values, such as a mask, in the bytes of a file: (H, W, 3) uint8.

    Transparent parts become 0; a colour profile is ignored. Raises BadImage.
    """
    return _decoded(content, _values)[0]


def _values(image: Image.Image) -> tuple[Image.Image, None]:
    image.info.pop("icc_profile", None)
    return to_rgb(image, background="black"), None


def decode_with_alpha(content: bytes, file: str = "") -> tuple[np.ndarray, np.ndarray | None]:
    """As `decode`, and the alpha channel: (H, W) uint8, or None for an image without transparency."""

    def colours(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        return to_rgb(image, file=file), alpha

    return _decoded(content, colours)


def _decoded(
    content: bytes, convert: Callable[[Image.Image], tuple[Image.Image, Image.Image | None]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The results of `convert` for the image in the bytes of a file, both upright. Raises BadImage."""
    if not content:
        raise BadImage(EMPTY)
    with open_image(io.BytesIO(content)) as image:
        transpose = exif_transpose(image)
        try:
            image.load()
            rgb, alpha = convert(image)
        except BadImage:
            raise
        except MemoryError as error:
            raise BadImage(f"not enough memory for its {image.width} x {image.height} pixels") from error
        except Exception as error:  # OSError, RuntimeError, ZeroDivisionError ...: each decoder has its own
            raise BadImage(f"cut off or damaged ({one_line(error)})") from error
    if transpose is not None:
        rgb, alpha = rgb.transpose(transpose), None if alpha is None else alpha.transpose(transpose)
    return np.asarray(rgb), None if alpha is None else np.asarray(alpha)


def has_other_colours(content: bytes) -> bool:
    """Whether the image in the bytes of a file has a profile that changes its colours. Reads the header only."""
    try:
        with open_image(io.BytesIO(content)) as image:
            pixel = Image.new(image.mode, (1, 1))
            pixel.info["icc_profile"] = image.info.get("icc_profile")
            return as_srgb(pixel) is not None
    except (BadImage, BadProfile, ValueError):  # ValueError: Pillow makes no new images of this mode
        return False


def has_transparency(content: bytes) -> bool:
    """Whether the image in the bytes of a file may have transparent parts. Reads the header only."""
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.has_transparency_data
    except BadImage:
        return False


class _PixelsInUse:
    """The number of pixels that this process is decoding, over all threads."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = threading.Condition()


_in_use = _PixelsInUse()


@contextmanager
def within_memory_limit(size: tuple[int, int]) -> Iterator[None]:
    """Wait until this process may decode an image of this size: MAX_PIXELS_AT_ONCE over all threads, or one larger image.

    Decoding, conversion and resizing together take about 13 bytes for each pixel.
    """
    pixels = size[0] * size[1]
    with _in_use.changed:
        _in_use.changed.wait_for(lambda: not _in_use.count or _in_use.count + pixels <= MAX_PIXELS_AT_ONCE)
        _in_use.count += pixels
    try:
        yield
    finally:
        if pixels > LARGE_IMAGE:  # else each thread's malloc arena keeps the memory of its largest image
            give_back_freed_memory()
        with _in_use.changed:
            _in_use.count -= pixels
            _in_use.changed.notify_all()


def fit(
    rgb: np.ndarray,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    interpolation: str | None = None,
) -> np.ndarray:
    """Resize an image to `resized` and crop `size` at `corner` (left, top); sizes are (width, height) in pixels.

    `interpolation` None: area averaging if both sides shrink, else Lanczos. Pillow computes only the pixels inside the crop;
    else the resized image of a strip of 1 x 5000 px would take a gigabyte.
    """
    height, width = rgb.shape[:2]
    shrinks = resized[0] <= width and resized[1] <= height
    if interpolation is None:
        interpolation = "area" if shrinks else "lanczos"
    left, top = corner
    if resized == (width, height):
        pixels = rgb[top : top + size[1], left : left + size[0]]
    elif interpolation == "area" and shrinks:
        pixels = cv2.resize(rgb, resized, interpolation=cv2.INTER_AREA)[top : top + size[1], left : left + size[0]]
    else:
        # Area averaging is not defined for a side that grows; OpenCV interpolates linearly then, and so does this.
        method = PILLOW_FILTERS["linear" if interpolation == "area" else interpolation]
        kx, ky = width / resized[0], height / resized[1]
        # By a rounding error the last column may end outside of the image; Pillow raises an error for that.
        box = (left * kx, top * ky, min((left + size[0]) * kx, width), min((top + size[1]) * ky, height))
        pixels = np.asarray(Image.fromarray(rgb).resize(size, method, box=box))
    if pixels.shape[:2] != (size[1], size[0]):
        raise ValueError(f"crop of {size} at {corner} lies outside of the resized image {resized}")
    return pixels
