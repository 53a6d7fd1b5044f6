"""Images and captions from a metadata file (`--in_json`, `metadata_file`), as tools for fine-tuning write it.

A .json file holds {image: {"caption": ..., "tags": ...}}, a .jsonl file a line {"image_path": image, ...} each. An image is
named with or without suffix, by a path of its own or by one below `image_dir`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.captions import count_tags, tag_joiner, warn_of_unused_lines
from library.data.config_keys import SubsetConfig
from library.data.folders import image_suffixes
from library.errors import UserError, listed
from library.files import as_on_disk, composed, names_by_nfc
from library.text_files import lines_of, parse_json, read_text

log = logging.getLogger(__name__)

USED_KEYS = ("caption", "tags")
# Keys that other tools write and this suite does not need: it reads sizes from the images.
IGNORED_KEYS = ("image_size", "train_resolution", "image_path")


@dataclass(frozen=True)
class Metadata:
    """The images of a metadata file that exist: names below the subset's `image_dir` (or absolute paths), and captions."""

    names: list[str]
    captions: dict[str, str]
    tags: dict[str, int]  # tag -> images, over all that the file lists


def read_metadata(subset: SubsetConfig, on_bad_image: str = "refuse") -> Metadata:
    """Read the metadata file of a subset. Raises UserError if it cannot be read, or if images of it are missing ("refuse")."""
    path = subset.metadata_file
    assert path is not None  # called where there is one
    captions: dict[str, str] = {}
    keys: dict[str, str] = {}
    missing, unknown, tags = [], set(), []
    for key, entry in _entries(path):
        unknown |= set(entry) - {*USED_KEYS, *IGNORED_KEYS}
        tags.append(entry.get("tags") or "")
        name = _image_of(key, subset.image_dir)
        if name is None:
            missing.append(key)
        elif name in captions:
            raise UserError(f"{path}: '{keys[name]}' and '{key}' are the same image {name}; take one of them out")
        else:
            keys[name], captions[name] = key, _caption(entry, subset)
    _report(path, subset.image_dir, missing, unknown, on_bad_image)
    if not captions:
        raise UserError(f"{path} lists no image that is there; give the folder of the images as image_dir (--train_data_dir)")
    return Metadata(sorted(captions), captions, count_tags(tags))


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key of the image, its values) in the file's order."""
    text = read_text(path, "metadata_file")
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(lines_of(text), start=1):
            if line.strip():
                entry = parse_json(line, path, number)
                if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
                    raise UserError(f'{path}, line {number}: expected {{"image_path": "...", "caption": "..."}}')
                yield entry["image_path"], _checked(entry, f"{path}, line {number}")
        return
    content = parse_json(text, path)
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected {{"image": {{"caption": "..."}}}}, got a {type(content).__name__}')
    for key, entry in content.items():
        yield key, _checked(entry, f"{path}, '{key}'")


def _checked(entry: Any, where: str) -> dict[str, Any]:
    texts = isinstance(entry, dict) and all(isinstance(entry.get(key) or "", str) for key in USED_KEYS)
    if not texts:
        raise UserError(f'{where}: expected {{"caption": "...", "tags": "..."}}, with texts')
    return entry


def _caption(entry: dict[str, Any], subset: SubsetConfig) -> str:
    """Caption and tags, joined. Without enable_wildcard only the first line of the caption is used."""
    lines = [line.strip() for line in lines_of(entry.get("caption") or "") if line.strip()]
    if len(lines) > 1 and not subset.enable_wildcard:
        warn_of_unused_lines(subset.metadata_file)
        lines = lines[:1]
    tags = " ".join(lines_of(entry.get("tags") or "")).strip()
    return "\n".join(tag_joiner(subset).join(part for part in (line, tags) if part) for line in lines or [""])


def _image_of(key: str, folder: Path) -> str | None:
    """The name of an image below `folder`, or its absolute path if it lies elsewhere; None if there is no such image."""
    for candidate in (folder / key, Path(key)):
        found = _with_suffix(candidate)
        if found is not None:
            path, base = found.absolute(), folder.absolute()
            return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
    return None


def _with_suffix(path: Path) -> Path | None:
    """The image at a path: the path itself, or the first file of this name with the suffix of an image."""
    names = names_by_nfc(as_on_disk(path.parent))  # cached: one listing serves all keys of a folder
    name, suffixes = composed(path.name), image_suffixes()
    ends = ("", *(end for suffix in suffixes for end in (suffix, suffix.upper())))
    for candidate in (name + end for end in ends):
        if candidate in names and os.path.splitext(candidate)[1].lower() in suffixes:
            return as_on_disk(path.parent) / names[candidate]
    return None


def _report(path: Path, folder: Path, missing: list[str], unknown: set[str], on_bad_image: str) -> None:
    names_by_nfc.cache_clear()
    if unknown:
        log.warning("%s: not used: %s", path, ", ".join(sorted(unknown)))
    if not missing:
        return
    text = f"{path}: {len(missing)} of its images are neither in {folder} nor where their paths say ({listed(missing)})"
    if on_bad_image == "skip":
        log.warning("%s; they are left out", text)
        return
    raise UserError(f"{text}; .npz files of sd-scripts do not stand in for images. Mend the paths, or give --on_bad_image=skip")
