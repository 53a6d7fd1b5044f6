"""The files of the caches beside the images: written whole or not at all; damaged ones are encoded again."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from library.files import atomic_write, read_safetensors_header

log = logging.getLogger(__name__)


def shapes_in(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name. Empty if there is no such file, or if it is damaged, which is logged."""
    if not path.exists():
        return {}
    try:
        header = read_safetensors_header(path)
    except (UserError, OSError) as error:
        log.warning("a file of the cache is made again: %s", error)
        return {}
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def require_writable(folder: Path, option: str, instead: str) -> None:
    """Make a cache's folder. Raises UserError if it cannot be written, naming `option` and `instead`, which needs no folder."""
    try:
        folder.mkdir(exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex[:8]}"  # several processes may try at once
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--{option} cannot write to {folder} ({error.strerror or error}); make the folder writable, "
            f"or give --{instead} instead, which keeps everything in memory"
        ) from error
