"""One image: from the bytes of a file to RGB pixels of the size that training wants.

What people see is what the network sees: EXIF rotation is applied, colours are brought from the image's profile to sRGB,
transparent parts become white, 16-bit grey is scaled, and of an animation the first frame is taken.
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

# A scan of 200 megapixels is no attack. Our own limit below replaces Pillow's, and names the image.
Image.MAX_IMAGE_PIXELS = None
# Its remarks on damaged EXIF data and the like name no file; what makes an image unusable is raised as an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")
MAX_PIXELS = 1_000_000_000
MOST_AT_ONCE = 100_000_000
LARGE = 16_000_000
EMPTY = "the file is empty (0 bytes)"
# Image generators write whole workflows into PNG text chunks; Pillow refuses those over 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28

# What training draws (plots, samples, sheets) carries this PNG text: --output_dir may be the data folder, and it is no data.
OWN_IMAGE = "sd-lora-suite drew"

ORIENTATION_TAG = 0x0112
TURN_BY_ORIENTATION = {
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
INTERPOLATIONS = ("area", *PILLOW_FILTERS)


class BadImage(Exception):
    """The file cannot be used as an image. The message is the reason, without the file's name."""


def readable_formats() -> list[str]:
    """Pillow formats tried on a file, whatever its suffix: no EPS and the like, which would start other programs."""
    for plug_in in ("pillow_avif", "pillow_jxl"):  # they register themselves with Pillow
        if importlib.util.find_spec(plug_in):
            importlib.import_module(plug_in)
    Image.init()
    wanted = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JXL", "JPEG2000", "PPM", "ICO")
    return [name for name in wanted if name in Image.OPEN]


FORMATS = readable_formats()


def own_mark(kind: str) -> PngImagePlugin.PngInfo:
    """For Pillow's `pnginfo`: marks an image as drawn by training. kind: "sample", say."""
    info = PngImagePlugin.PngInfo()
    info.add_text(OWN_IMAGE, kind)
    return info


def open_image(source: Path | io.BytesIO) -> Image.Image:
    """Read the header only. Raises BadImage with the reason."""
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("no image, or cut off in its header") from error
    except Exception as error:  # the decoders raise all sorts of errors for a damaged file
        raise BadImage(getattr(error, "strerror", None) or one_line(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000:,} million; make it smaller")
    return image


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How the image must be turned to stand upright, from the EXIF data in front of the pixels."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return None
    try:
        # Not image.getexif(): for a PNG that would decode the pixels in search of data behind them.
        orientation = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data raises all sorts of errors, and the image is good without them
        return None
    return TURN_BY_ORIENTATION.get(orientation)


def _webp_size(path: Path) -> tuple[int, int] | None:
    """Size of a whole WebP file without EXIF or XMP data, else None. Pillow would read the file to its end for it.

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
        turned = turn_of(image) in (
            Image.Transpose.TRANSPOSE,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
            Image.Transpose.ROTATE_270,
        )
        return (height, width) if turned else (width, height), OWN_IMAGE in image.info


def to_rgb(image: Image.Image, background: str = "white", file: str = "") -> Image.Image:
    """8-bit sRGB: transparent parts on white (as viewers show them), 16-bit grey scaled rather than cut off.

    background: another colour for transparent parts. file: its name, for the warning of a profile that cannot be used.
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
        _say_bad_profile(file, str(error))
        rgb = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgb is not None:
            rgb.putalpha(rgba.getchannel("A"))
            rgba = rgb
        return Image.alpha_composite(Image.new("RGBA", image.size, background), rgba).convert("RGB")
    return image.convert("RGB") if rgb is None else rgb


@lru_cache(maxsize=4096)
def _say_bad_profile(file: str, reason: str) -> None:
    """Once a file, since it is decoded again in every epoch."""
    log.warning("%s: its colour profile is not used (%s), its colours are taken for sRGB", file or "an image", reason)


def decode(content: bytes, file: str = "") -> np.ndarray:
    """The upright image in a file's bytes as (H, W, 3) uint8 sRGB. Raises BadImage. file: its name, for warnings."""
    return decode_with_alpha(content, file)[0]


def decode_values(content: bytes) -> np.ndarray:
    """The upright image in a file's bytes that holds values rather than colours, such as a mask: (H, W, 3) uint8.

    Transparent parts become black, since what was erased is 0; a colour profile is ignored. Raises BadImage.
    """
    return _decoded(content, _values)[0]


def _values(image: Image.Image) -> tuple[Image.Image, None]:
    image.info.pop("icc_profile", None)
    return to_rgb(image, background="black"), None


def decode_with_alpha(content: bytes, file: str = "") -> tuple[np.ndarray, np.ndarray | None]:
    """As `decode`, and the alpha channel as (H, W) uint8; None for an image that has no transparency."""

    def colours(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        return to_rgb(image, file=file), alpha

    return _decoded(content, colours)


def _decoded(
    content: bytes, convert: Callable[[Image.Image], tuple[Image.Image, Image.Image | None]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `convert` makes of the image in a file's bytes, upright. Raises BadImage."""
    if not content:
        raise BadImage(EMPTY)
    with open_image(io.BytesIO(content)) as image:
        turn = turn_of(image)
        try:
            image.load()
            rgb, alpha = convert(image)
        except BadImage:
            raise
        except MemoryError as error:
            raise BadImage(f"not enough memory for its {image.width} x {image.height} pixels") from error
        except Exception as error:  # OSError, RuntimeError, ZeroDivisionError ...: each decoder has its own
            raise BadImage(f"cut off or damaged ({one_line(error)})") from error
    if turn is not None:
        rgb, alpha = rgb.transpose(turn), None if alpha is None else alpha.transpose(turn)
    return np.asarray(rgb), None if alpha is None else np.asarray(alpha)


def has_other_colours(content: bytes) -> bool:
    """Whether a file's bytes hold a colour profile that changes its colours. Reads the header only."""
    try:
        with open_image(io.BytesIO(content)) as image:
            pixel = Image.new(image.mode, (1, 1))
            pixel.info["icc_profile"] = image.info.get("icc_profile")
            return as_srgb(pixel) is not None
    except (BadImage, BadProfile, ValueError):  # ValueError: a mode of which there are no new images
        return False


def has_transparency(content: bytes) -> bool:
    """Whether parts of the image in a file's bytes may be transparent. Reads the header only."""
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.has_transparency_data
    except BadImage:
        return False


class _Room:
    """How many pixels are being decoded in this process."""

    def __init__(self) -> None:
        self.pixels = 0
        self.changed = threading.Condition()


_room = _Room()


@contextmanager
def room_for(size: tuple[int, int]) -> Iterator[None]:
    """Wait until an image of this size may be decoded: threads together hold MOST_AT_ONCE pixels, or one larger image.

    A pixel takes about 13 bytes on its way from the file to its bucket.
    """
    pixels = size[0] * size[1]
    with _room.changed:
        _room.changed.wait_for(lambda: not _room.pixels or _room.pixels + pixels <= MOST_AT_ONCE)
        _room.pixels += pixels
    try:
        yield
    finally:
        if pixels > LARGE:  # else each thread's arena keeps what its largest image took
            give_back_freed_memory()
        with _room.changed:
            _room.pixels -= pixels
            _room.changed.notify_all()


def fit(
    rgb: np.ndarray,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    interpolation: str | None = None,
) -> np.ndarray:
    """Resize an image to `resized` and cut out `size` at `corner` (left, top); all (width, height) in pixels.

    Without an interpolation: area averaging where both sides shrink, else Lanczos. Filters of Pillow compute only
    the pixels that are kept, so a strip of 1 x 5000 px does not become a gigabyte on the way to its bucket.
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
        # Averaging over areas has no meaning where a side grows; OpenCV interpolates linearly there, and so do we.
        method = PILLOW_FILTERS["linear" if interpolation == "area" else interpolation]
        kx, ky = width / resized[0], height / resized[1]
        # The last column may end a rounding error outside of the image, which Pillow refuses.
        box = (left * kx, top * ky, min((left + size[0]) * kx, width), min((top + size[1]) * ky, height))
        pixels = np.asarray(Image.fromarray(rgb).resize(size, method, box=box))
    if pixels.shape[:2] != (size[1], size[0]):
        raise ValueError(f"cut of {size} at {corner} lies outside of the resized image {resized}")
    return pixels
