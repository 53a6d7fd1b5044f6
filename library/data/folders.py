"""Which files of a folder are images, and which folders under `--train_data_dir` become subsets."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from library.errors import UserError, listed
from library.files import as_on_disk

log = logging.getLogger(__name__)

USUAL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Image formats that are not read; such files are left out with a warning.
UNREAD_SUFFIXES = frozenset((
    ".heic", ".heif", ".hif", ".jxl", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".wdp", ".hdp", ".tga",
    ".psd", ".psb", ".svg", ".svgz", ".exr", ".hdr", ".dds", ".qoi", ".pcx", ".sgi", ".rgb", ".xcf", ".kra", ".clip", ".eps",
    ".ai", ".cur", ".icns", ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef",
    ".srw", ".raw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw",
))  # fmt: skip
# Files that are no images. A file with an unknown suffix is opened to see.
OTHER_SUFFIXES = frozenset((
    ".txt", ".caption", ".tags", ".json", ".jsonl", ".csv", ".tsv", ".toml", ".yaml", ".yml", ".md", ".html", ".xml", ".xmp",
    ".aae", ".log", ".npz", ".npy", ".pt", ".pth", ".ckpt", ".safetensors", ".zip", ".rar", ".7z", ".tar", ".gz", ".py",
    ".sh", ".bat", ".ps1", ".ini", ".db", ".url", ".lnk", ".mp4", ".mov", ".webm", ".mkv", ".avi", ".mp3", ".wav", ".pdf",
    ".doc", ".docx",
))  # fmt: skip
MAX_FILES_OPENED = 100  # of unknown suffix, in each folder


@lru_cache(maxsize=1)
def image_suffixes() -> tuple[str, ...]:
    """Suffixes of images, in lower case; upper case counts too. AVIF, JPEG 2000 and JPEG XL if Pillow can read them.

    Names without suffix in a metadata file are completed in this order: the usual suffixes first.
    """
    from PIL import features

    suffixes = [*USUAL_SUFFIXES]
    if "avif" in features.get_supported_modules() or importlib.util.find_spec("pillow_avif"):
        suffixes += [".avif", ".avifs"]
    if "jpg_2000" in features.get_supported_codecs():
        suffixes += [".jp2", ".j2k", ".jpf", ".jpx"]
    suffixes += [".apng", ".jpe", ".jfif", ".jif", ".jpg_large", ".jpg_orig", ".png_large"]
    suffixes += [".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".ico"]
    if importlib.util.find_spec("pillow_jxl"):
        suffixes.append(".jxl")
    return tuple(suffixes)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders directly in a folder, sorted, without hidden ones (.name).

    A broken link counts as a file: the error of opening it names it.
    """
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:  # tells files from folders without a system call for each
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror or error}") from error
    return sorted(files), sorted(folders)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_images(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name."""
    return [folder / name for name in _scan(folder)[0] if is_image(name)]


def is_image(name: str) -> bool:
    """Whether a file counts as an image, by its name."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def is_unread(name: str) -> bool:
    """Whether a file is an image of a kind that is not read, by its name."""
    return os.path.splitext(name)[1].lower() in UNREAD_SUFFIXES and not is_image(name)


def _has_images(folder: Path) -> bool:
    return any(is_image(name) for name in _scan(folder)[0])


def _subfolders(folder: Path) -> list[Path]:
    return [folder / name for name in _scan(folder)[1]]


def check_images(folder: Path, caption_extension: str, where: str) -> None:
    """Raises UserError for a subset's folder without images. Warns about files in it that look like images and are not used."""
    names, _ = _scan(folder)
    images = [name for name in names if is_image(name)]
    suffixes = " ".join(image_suffixes())
    if not images:
        below = [child.name for child in _subfolders(folder) if _has_images(child)]
        cure = f"; there are some in its subfolder {below[0]}, give each such folder a subset of its own" if below else ""
        raise UserError(f"{where}: no image ({suffixes}) lies in {folder}{cure}")
    unusual = [name for name in images if os.path.splitext(name)[1].lower() not in (*USUAL_SUFFIXES, ".avif", ".jxl")]
    if unusual:  # other trainers leave them out
        log.warning("%s: images of unusual kinds are used too: %s", folder, listed(unusual))
    unread = unread_images(folder, caption_extension)
    if unread:
        log.warning("%s: images left out: %s; convert them to one of %s", folder, listed(unread), suffixes)
    _warn_of_other_captions(folder, names, images, caption_extension)


def unread_images(folder: Path, caption_extension: str) -> list[str]:
    """Files directly in a folder that are images and are not read: by suffix or, if the suffix is unknown, by content."""
    unread, unknown = [], []
    for name in _scan(folder)[0]:
        is_known = is_image(name) or os.path.splitext(name)[1].lower() in OTHER_SUFFIXES
        if is_unread(name):
            unread.append(name)
        elif not is_known and not name.lower().endswith(caption_extension.lower()):
            unknown.append(name)
    return sorted(unread + [name for name in unknown[:MAX_FILES_OPENED] if _holds_an_image(folder / name)])


def _holds_an_image(path: Path) -> bool:
    from library.data.images import BadImage, open_image

    try:
        open_image(path).close()
    except BadImage:
        return False
    return True


def warn_of_inner_images(folders: Iterable[Path], used: Iterable[Path]) -> None:
    """Warn about folders below these whose images no subset uses. used: folders that subsets use, for images or masks."""
    seen = {os.path.realpath(folder) for folder in used}
    for folder in dict.fromkeys(folders):
        inner = [os.path.relpath(below, folder) for below in _unused_below(folder, seen)]
        if inner:
            log.warning(
                "%s: images in folders inside it are left out: %s; give each such folder a subset of its own",
                folder,
                listed(inner),
            )


def _unused_below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Folders below that hold images which training did not draw. Folders in `seen` are passed over and new ones added to it,
    so that circular links end."""
    for below in _subfolders(folder):
        real = os.path.realpath(below)
        if real in seen:
            continue
        seen.add(real)
        try:
            if any(not _is_drawn_by_training(image) for image in list_images(below)[:3]):
                yield below
            yield from _unused_below(below, seen)
        except UserError as error:
            log.warning("%s; it is left out", error)


def _is_drawn_by_training(path: Path) -> bool:
    from library.data.images import BadImage, header_of

    try:
        return header_of(path)[1]
    except BadImage:
        return False


def _warn_of_other_captions(folder: Path, names: list[str], images: list[str], extension: str) -> None:
    """Warn if no caption has the given extension but the images have text files of another one: probably a mistake."""
    files = set(names)
    stems = {os.path.splitext(name)[0] for name in images}
    if any(stem + extension in files for stem in stems):
        return
    for other in (".txt", ".caption"):
        count = sum(stem + other in files for stem in stems)
        if count and other != extension:
            log.warning(
                "%s: no image has a %s file, but %d have a %s file, which is NOT used; if these are the captions, "
                'give --caption_extension=%s, or caption_extension = "%s" in the dataset file',
                folder,
                extension,
                count,
                other,
                other,
                other,
            )


@dataclass(frozen=True)
class FolderSubset:
    """A folder that becomes a subset. `num_repeats` and `class_tokens` are None if its name does not give them."""

    image_dir: Path
    num_repeats: int | None = None
    class_tokens: str | None = None


def image_subsets(parent: Path, option: str) -> list[FolderSubset]:
    """The subsets under `--train_data_dir` or `--reg_data_dir`, sorted.

    They are `parent` itself if it holds images, and its subfolders named `<repeats>_<class>`. If there are neither, they are the
    other subfolders that hold images. A subfolder without images stands for those of its own subfolders that hold some.
    Raises UserError if the folder is missing or no image is found.
    """
    parent = as_on_disk(parent)
    if not parent.is_dir():
        raise UserError(
            f"{option}={parent}: {'this is a file, not a folder' if parent.exists() else 'no such folder'}; "
            f"looked in {Path.cwd()}"
        )
    found = [FolderSubset(parent)] if _has_images(parent) else []
    if found and _repeats_and_class(Path(os.path.abspath(parent)).name):
        log.warning(
            "%s=%s: a name such as 10_cat counts for subfolders only; give the folder above to have it count", option, parent
        )
    named, others = _named_subfolders(parent)
    found += named
    plain = [inner for folder in others for inner in _image_folders(folder, warn_if_empty=False)]
    names = ", ".join(str(folder.relative_to(parent)) for folder in plain)
    if plain and found:
        log.warning("%s: left out, since not named <repeats>_<class> (such as 10_cat): %s", parent, names)
    elif plain:
        log.warning(
            "%s: no subfolder is named <repeats>_<class> (such as 10_cat); all with images are used, without a class: %s",
            parent,
            names,
        )
        found = [FolderSubset(folder) for folder in plain]
    if not found:
        raise UserError(
            f"{option}={parent}: no image found, neither in the folder nor in its subfolders; "
            f"files ending in {' '.join(image_suffixes())} count"
        )
    return found


def _named_subfolders(parent: Path) -> tuple[list[FolderSubset], list[Path]]:
    """The subsets of the subfolders named `<repeats>_<class>`, and the subfolders of other names."""
    found: list[FolderSubset] = []
    others = []
    for folder in _subfolders(parent):
        rule = _repeats_and_class(folder.name)
        if rule is None:
            others.append(folder)
        elif rule[0] < 1:
            log.warning("%s is left out: its name asks for %d repeats", folder, rule[0])
        else:
            if "_" not in folder.name:
                log.warning("%s: the name is a number only, so each image is used %d times an epoch", folder, rule[0])
            found += [FolderSubset(inner, *rule) for inner in _image_folders(folder)]
    return found, others


def _repeats_and_class(name: str) -> tuple[int, str] | None:
    """ "20_sks_dog girl" is (20, "sks_dog girl"); None for a name that does not start with a whole number and "_"."""
    first, _, rest = name.partition("_")
    try:
        return int(first), rest
    except ValueError:
        return None


def _image_folders(folder: Path, warn_if_empty: bool = True) -> list[Path]:
    """The folder itself if it holds images, else those of its subfolders that do."""
    if _has_images(folder):
        return [folder]
    inner = [child for child in _subfolders(folder) if _has_images(child)]
    if inner and warn_if_empty:
        log.warning("%s: no image lies in the folder itself; those in its subfolders are used", folder)
    elif warn_if_empty:
        log.warning("%s is left out: there is no image in it", folder)
    return inner
