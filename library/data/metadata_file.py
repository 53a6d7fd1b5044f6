"""Images and captions from a metadata file (`--in_json`, `metadata_file`), as tools for fine-tuning write it.

A .json file holds {image: {"caption": ..., "tags": ...}}, a .jsonl file a line {"image_path": image, ...} each. An image is
named with or without suffix, by a path of its own or by one below `image_dir`.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.captions import count_tags, joint, say_first_line_counts
from library.data.config_keys import SubsetConfig
from library.data.folders import image_suffixes
from library.errors import UserError
from library.files import as_on_disk, names_by_look
from library.text_files import lines_of, parse_json, read_text

log = logging.getLogger(__name__)

KNOWN = ("caption", "tags")
# Sizes are read from the images, and buckets follow from these; the names are those of tools and older caches.
NOT_NEEDED = ("image_size", "train_resolution", "image_path")
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Metadata:
    """The images of a metadata file that are there: names below the subset's `image_dir` (or whole paths), and captions."""

    names: list[str]
    captions: dict[str, str]
    tags: dict[str, int]  # tag -> images, of all that the file lists


def read_metadata(subset: SubsetConfig, on_bad_image: str = "refuse") -> Metadata:
    """Read the metadata file of a subset. Raises UserError if it is no such file, or lists images that are missing ("refuse")."""
    path = subset.metadata_file
    assert path is not None  # called where there is one
    captions: dict[str, str] = {}
    keys: dict[str, str] = {}
    missing, unknown, tags = [], set(), []
    for key, entry in _entries(path):
        unknown |= set(entry) - {*KNOWN, *NOT_NEEDED}
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


def _checked(entry: Any, place: str) -> dict[str, Any]:
    texts = isinstance(entry, dict) and all(isinstance(entry.get(key) or "", str) for key in KNOWN)
    if not texts:
        raise UserError(f'{place}: expected {{"caption": "...", "tags": "..."}}, with texts')
    return entry


def _caption(entry: dict[str, Any], subset: SubsetConfig) -> str:
    """Caption and tags, joined; with enable_wildcard the tags follow each line of the caption, else its first line."""
    lines = [line.strip() for line in lines_of(entry.get("caption") or "") if line.strip()]
    if len(lines) > 1 and not subset.enable_wildcard:
        say_first_line_counts(subset.metadata_file)
        lines = lines[:1]
    tags = " ".join(lines_of(entry.get("tags") or "")).strip()
    return "\n".join(joint(subset).join(part for part in (line, tags) if part) for line in lines or [""])


def _image_of(key: str, folder: Path) -> str | None:
    """The name of an image below `folder`, or its whole path if it lies elsewhere; None if there is none."""
    for place in (folder / key, Path(key)):
        found = _with_suffix(place)
        if found is not None:
            whole, base = found.absolute(), folder.absolute()
            return whole.relative_to(base).as_posix() if whole.is_relative_to(base) else str(whole)
    return None


def _with_suffix(path: Path) -> Path | None:
    """The image that a path means: itself, or the first one of this name with a suffix of images."""
    names = names_by_look(as_on_disk(path.parent))  # one look into a folder serves all keys of it
    own, suffixes = unicodedata.normalize("NFC", path.name), image_suffixes()
    ends = ("", *(end for suffix in suffixes for end in (suffix, suffix.upper())))
    for candidate in (own + end for end in ends):
        if candidate in names and os.path.splitext(candidate)[1].lower() in suffixes:
            return as_on_disk(path.parent) / names[candidate]
    return None


def _report(path: Path, folder: Path, missing: list[str], unknown: set[str], on_bad_image: str) -> None:
    names_by_look.cache_clear()
    if unknown:
        log.warning("%s: not used: %s", path, ", ".join(sorted(unknown)))
    if not missing:
        return
    named = ", ".join(missing[:NAMED_AT_MOST]) + (", ..." if len(missing) > NAMED_AT_MOST else "")
    text = f"{path}: {len(missing)} of its images are neither in {folder} nor where their paths say ({named})"
    if on_bad_image == "skip":
        log.warning("%s; they are left out", text)
        return
    raise UserError(f"{text}; .npz files of sd-scripts do not stand in for images. Mend the paths, or give --on_bad_image=skip")
