"""Smaller copies of images in several resolutions, and copies of the files that belong to them (such as captions)."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from library.data.folders import image_suffixes, is_image, is_unread
from library.data.images import BadImage, exif_transpose, open_image, to_rgb
from library.errors import UserError
from library.files import unflushed_write

# Pillow's filters widen as an image shrinks, so that fine patterns do not turn into false ones.
FILTERS = {
    "cubic": Image.Resampling.BICUBIC,
    "lanczos4": Image.Resampling.LANCZOS,
    "linear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class Settings:
    """resolutions: (width, height); only their areas matter. Copies are cropped to multiples of divisible_by."""

    resolutions: tuple[tuple[int, int], ...]
    divisible_by: int = 1
    interpolation: str = "area"
    save_as_png: bool = False
    copy_associated_files: bool = False

    @property
    def suffix(self) -> str:
        return ".png" if self.save_as_png else ".jpg"


def new_size(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """Size of a copy: at most the area of `resolution`, and at most the size of the image.

    >>> new_size((1024, 512), (512, 512))
    (724, 362)
    """
    width, height = size
    factor = math.sqrt(resolution[0] * resolution[1] / (width * height))
    if factor >= 1:
        return size
    # 1e-6: rounding must not make a side that is an exact integer one pixel shorter.
    return max(1, int(width * factor + 1e-6)), max(1, int(height * factor + 1e-6))


def resized(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """The RGB or RGBA image in another size. The colour of transparent pixels does not spread to their neighbours."""
    if size == image.size:
        return image
    if interpolation != "area":
        return image.resize(size, FILTERS[interpolation])
    mode = image.mode
    source = image.convert("RGBa") if mode == "RGBA" else image  # colours times alpha
    pixels = cv2.resize(np.asarray(source), size, interpolation=cv2.INTER_AREA)
    return Image.frombytes(source.mode, size, pixels.tobytes()).convert(mode)


def cropped(image: Image.Image, divisible_by: int) -> Image.Image:
    """The middle of the image with sides that are multiples of divisible_by."""
    width, height = (side - side % divisible_by for side in image.size)
    if not width or not height:
        raise BadImage(f"{image.width} x {image.height} pixels are fewer than --divisible_by {divisible_by}")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def load(path: Path, with_alpha: bool) -> Image.Image:
    """The upright image in RGB, or RGBA if it is transparent and `with_alpha`. Raises BadImage."""
    with open_image(path) as image:
        transpose = exif_transpose(image)
        # A copy of an RGB image keeps pixel values and profile; images of other modes are converted to sRGB.
        profile = image.info.pop("icc_profile", None) if image.mode in ("RGB", "RGBA", "P") else None
        try:
            image.load()
            pixels = image.convert("RGBA") if with_alpha and image.has_transparency_data else to_rgb(image)
        except BadImage:
            raise
        except Exception as error:  # each decoder has errors of its own
            raise BadImage(f"cut off or damaged ({error})") from error
    pixels = pixels if transpose is None else pixels.transpose(transpose)
    pixels.info = {"icc_profile": profile} if profile else {}
    return pixels


def make_copies(source: Path, target_folder: Path, settings: Settings, associated: Sequence[Path]) -> None:
    """Write the image in every resolution, each resized from the original, with copies of the files that belong to it."""
    image = load(source, settings.save_as_png)
    profile = image.info.get("icc_profile")
    for resolution in settings.resolutions:
        copy = cropped(resized(image, new_size(image.size, resolution), settings.interpolation), settings.divisible_by)
        stem = copy_name(source, resolution)
        # Level 1 halves the time of PNG for a few per cent of size.
        options = {"compress_level": 1} if settings.save_as_png else {"quality": 100}
        save(copy, target_folder / f"{stem}{settings.suffix}", icc_profile=profile, **options)
        for other in associated:
            copy_file(other, target_folder / f"{stem}{other.suffix}")


def copy_name(source: Path, resolution: tuple[int, int]) -> str:
    return f"{source.stem}+{resolution[0]}x{resolution[1]}"


def save(image: Image.Image, path: Path, **options: Any) -> None:
    """Write an image; it appears under its name when it is complete."""
    with unflushed_write(path) as temporary:
        image.save(temporary, **options)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file; it appears under its name when it is complete."""
    with unflushed_write(path) as temporary:
        shutil.copyfile(source, temporary)


def files_below(source: Path, target: Path) -> list[Path]:
    """All files in and below the source folder, without hidden ones and those in the target folder."""
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _same(Path(folder) / name, target))
        found += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    return found


def _same(path: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(path, other)


def check_copy_names(images: Sequence[Path]) -> None:
    """Raises UserError if two images would get copies of the same name."""
    seen: dict[tuple[Path, str], Path] = {}
    for image in images:
        # On Windows and macOS A.jpg and a.jpg are the same file.
        other = seen.setdefault((image.parent, image.stem.lower()), image)
        if other is not image:
            raise UserError(f"{other} and {image.name} would get copies of one name; rename one of them")


def resize_folder(source: Path, target: Path, settings: Settings) -> list[str]:
    """Copy the source folder to the target folder and add the smaller copies. Returns a line for each file that failed."""
    files = files_below(source, target)
    images = [path for path in files if is_image(path.name)]
    if not images:
        raise UserError(f"no images ({' '.join(image_suffixes())}) in {source}")
    check_copy_names(images)
    others: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        if not is_image(path.name):
            others.setdefault((path.parent, path.stem), []).append(path)

    def work(path: Path) -> None:
        folder = target / path.parent.relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        copy_file(path, folder / path.name)
        if is_image(path.name):
            associated = others.get((path.parent, path.stem), []) if settings.copy_associated_files else []
            make_copies(path, folder, settings, associated)

    cv2.setNumThreads(1)  # the pool below uses all cores
    bad = [f"{path}: images of this kind are not read; it is copied as it is" for path in files if is_unread(path.name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = {pool.submit(work, path): path for path in files}
        try:
            for task in tqdm(as_completed(tasks), total=len(tasks), unit="file", desc="resizing"):
                try:
                    task.result()
                except (BadImage, OSError) as error:
                    bad.append(f"{tasks[task]}: {error}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(bad)
