"""Files: written whole or not at all, and hashed as the ecosystem does."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError

from library.errors import UserError, one_line
from library.safe_text import as_unicode

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)

# What writers raise for a full disk, a lost folder or a text that is no Unicode; safetensors and torch have errors of their own.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, UnicodeError)


def as_on_disk(path: Path) -> Path:
    """The path, or one that looks the same and is there: é may be one letter, or e and an accent, by system and archive."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    parent = as_on_disk(path.parent) if path.parent != path else path
    names_by_look.cache_clear()  # what is asked for may have been made a moment ago
    return parent / names_by_look(parent).get(unicodedata.normalize("NFC", path.name), path.name)


@lru_cache(maxsize=256)
def names_by_look(folder: Path) -> dict[str, str]:
    """The names in a folder by their composed form, which tells what looks the same; empty if there is no such folder.

    Of two names that look the same the one in composed form counts. Looked up once a folder.
    """
    try:
        return {unicodedata.normalize("NFC", name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


@contextmanager
def _written_beside(path: Path, take_name: Callable[[Path], object]) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, flush the file to disk and let `take_name` name it.

    The temporary name keeps the suffix, since writers choose a format by it; the rest is cut, as names end at 255 bytes.
    If the block raises, nothing is left.
    """
    temporary = path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # some writers make files that only their owner can read
        take_name(temporary)
    except WRITE_ERRORS as error:
        if isinstance(error, (NotImplementedError, RecursionError)):  # RuntimeErrors, and no fault of the disk
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write {path}: {reason}; check the folder, its rights and free space") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, the file is flushed and renamed to `path`."""
    path = Path(path)
    with _written_beside(path, lambda temporary: os.replace(temporary, path)) as temporary:
        yield temporary


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically, with \\n line ends on every system; what is no Unicode in it becomes U+FFFD."""
    with atomic_write(path) as temporary:
        temporary.write_text(as_unicode(text), encoding="utf-8", newline="\n")


def write_new(paths: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """Write a file under the first of `paths` that is free, and return that; it appears whole, and nothing is ever replaced.

    write: called with a temporary path in the same folder. `paths` may be endless.
    """
    paths = iter(paths)
    path = first = next(paths)

    def take_free_name(temporary: Path) -> None:
        nonlocal path
        while not _take_name(temporary, path):
            path = next(paths)

    with _written_beside(first, take_free_name) as temporary:
        write(temporary)
    return path


def _take_name(temporary: Path, path: Path) -> bool:
    """Give the file the name `path` unless there is such a file, even if another process makes one at this moment."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


def read_safetensors_header(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON header of a .safetensors file, checked against the file's length.

    Raises UserError, naming the file and the reason, if it is truncated or something else.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{path} is no .safetensors file or is cut off: its header does not fit; fetch it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no .safetensors file: its header is not readable; fetch it again") from error
    if isinstance(header, dict) and header.get("__metadata__", {}) is None:  # null, as some writers have it
        del header["__metadata__"]
    if not isinstance(header, dict) or not _is_metadata(header.get("__metadata__", {})):
        raise UserError(f"{path} is no .safetensors file: its header is not readable; fetch it again")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise UserError(
                f"{path} is damaged: its header does not say type, shape and place of the tensor {name}; fetch it again"
            )
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise UserError(f"{path} is cut off or damaged: {8 + length + end:,} bytes expected, {size:,} found; fetch it again")
    return header


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_entry(entry: Any) -> bool:
    """Whether a tensor is described as the format says: dtype, shape, and where its bytes begin and end."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    return _are_counts(shape) and _are_counts(place) and len(place) == 2 and place[0] <= place[1]


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def sha256_of_file(path: str | os.PathLike) -> str:
    """64 hex digits over the whole file: the web UI's model hash, `ss_new_sd_model_hash`."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def legacy_hash_of_file(path: str | os.PathLike) -> str:
    """8 hex digits over bytes 0x100000 to 0x110000 of the file: the web UI's old model hash, `ss_sd_model_hash`."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
