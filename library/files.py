"""Files: atomic writing, headers of .safetensors files, and the hashes that web UIs use."""

from __future__ import annotations

import hashlib
import json
import os
import stat
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

# Errors of writers for a full disk, a lost folder or text that is no Unicode; safetensors and torch raise errors of their own.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, UnicodeError)


def composed(name: str) -> str:
    """A name in Unicode's composed form: é may be one letter, or e and an accent, and systems encode it differently."""
    return unicodedata.normalize("NFC", name)


def as_on_disk(path: Path) -> Path:
    """The path, or an existing one that differs only in Unicode form."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    parent = as_on_disk(path.parent) if path.parent != path else path
    names_by_nfc.cache_clear()  # the file may be new
    return parent / names_by_nfc(parent).get(composed(path.name), path.name)


def on_disk(text: str) -> str:
    """The text of a path as `as_on_disk` finds it, with the home folder for `~`: shells leave `--vae=~/x` as it is.

    What is in ASCII, which may be a URL or a name on the Hub, stays otherwise as it is.
    """
    text = os.path.expanduser(text)
    return text if text.isascii() else str(as_on_disk(Path(text)))


@lru_cache(maxsize=256)
def names_by_nfc(folder: Path) -> dict[str, str]:
    """Names in a folder by their composed Unicode form; empty if there is no such folder. Cached.

    Of two names with the same composed form the one in that form counts.
    """
    try:
        return {composed(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


@contextmanager
def _written_beside(path: Path, take_name: Callable[[Path], object]) -> Iterator[Path]:
    """Give a temporary path beside `path`; if the block succeeds, flush the file to disk and call `take_name` on it.

    If the block raises, the temporary file is removed.
    """
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rights = _rights_of_new_files(path.parent)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, rights)  # some writers make files that only the owner can read
        take_name(temporary)
    except WRITE_ERRORS as error:
        if isinstance(error, (NotImplementedError, RecursionError)):  # RuntimeErrors that are not about the disk
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write {path}: {reason}; check the folder, its rights and free space") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _temporary_beside(path: Path) -> Path:
    """A hidden name with the same suffix, by which writers choose a format; the stem is cut, as names have at most 255 bytes."""
    return path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex[:8]}{path.suffix}")


@lru_cache(maxsize=256)
def _rights_of_new_files(folder: Path) -> int:
    """The permissions of a new file in this folder. They depend on umask, which Python can only read by setting it."""
    probe = folder / f".{uuid.uuid4().hex}"
    with open(probe, "xb") as file:
        rights = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return rights


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; if the block succeeds, the file is flushed and renamed to `path`."""
    path = Path(path)
    with _written_beside(path, lambda temporary: os.replace(temporary, path)) as temporary:
        yield temporary


@contextmanager
def unflushed_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; if the block succeeds, the file is renamed to `path`.

    For thousands of files of which each can be made again: nothing is flushed to disk, and errors stay as they are.
    """
    temporary = _temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically, with \\n line ends on every system; lone surrogates become U+FFFD."""
    with atomic_write(path) as temporary:
        temporary.write_text(as_unicode(text), encoding="utf-8", newline="\n")


def write_new(paths: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """Write a file atomically under the first of `paths` that does not exist, and return that path. Nothing is replaced.

    write: called with a temporary path in the same folder. `paths` may be infinite.
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
    """Rename the file to `path` unless that exists; safe if another process makes it at the same time."""
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

    Raises UserError, naming the file and the reason, if it is truncated or of another format.
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
    if isinstance(header, dict) and header.get("__metadata__", {}) is None:  # null, which some writers put there
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


def read_safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What a .safetensors file says of itself; nothing where it says nothing. Raises as `read_safetensors_header` does."""
    return read_safetensors_header(path).get("__metadata__", {})


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_entry(entry: Any) -> bool:
    """Whether an entry of a header is valid: dtype, shape, and begin and end of its bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]


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
