"""The images of a folder and their sizes, read from the file headers without decoding.

An index is compact (a name and a size for each image), since datasets of 100,000 images are common.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from library.data.folders import list_images
from library.data.images import BadImage, decode, header_of, size_of, within_memory_limit
from library.errors import UserError, counted, listed
from library.parallel import ahead

log = logging.getLogger(__name__)

Source = TypeVar("Source")

CHUNK = 128  # files of one task of a thread; with fewer, handing over tasks would cost more than reading


@dataclass(frozen=True)
class Images:
    """The usable images of one folder, sorted by name."""

    folder: Path
    names: list[str]
    sizes: np.ndarray  # (n, 2) int32: width, height of the upright image

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> Path:
        return self.folder / self.names[number]


def in_threads(work: Callable, items: Sequence, progress: str, chunk: int = CHUNK, workers: int | None = None) -> Iterable:
    """work(item) for each item, in order, computed in threads; a progress bar appears after a second."""
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    threads = workers or min(32, 4 * (os.cpu_count() or 1))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(items), desc=progress, unit=" files", delay=1.0) as bar,
        closing(ahead(pool, lambda part: [work(item) for item in part], chunks, 4 * threads)) as done,
    ):
        for results in done:
            bar.update(len(results))
            yield from results


def _size_or_reason(path: Path) -> tuple[int, int] | str | None:
    """The size, or the reason why the file cannot be used; None for an image that training drew, which is not data."""
    try:
        size, is_own = header_of(path)
        return None if is_own else size
    except BadImage as error:
        return str(error)


def _decoding_problem(path: Path) -> str | None:
    try:
        with within_memory_limit(size_of(path)):
            decode(path.read_bytes(), str(path))
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _report_bad(bad: list[tuple[Path, str]], on_bad_image: str) -> None:
    """Report images that cannot be used: a warning for each ("skip"), or one UserError that names the first ones."""
    if on_bad_image == "skip":
        for path, reason in bad:
            log.warning("skipped %s: %s", path, reason)
        if bad:
            log.warning("%s skipped", counted(len(bad), "image"))
    elif bad:
        named = listed([f"{path} ({reason})" for path, reason in bad], separator="; ")
        raise UserError(f"{counted(len(bad), 'image')} cannot be used: {named}; mend or remove them, or give --on_bad_image=skip")


def _report_own(own: list[Path]) -> None:
    if own:
        log.warning("%s: left out %s that training drew", own[0].parent, counted(len(own), "plot or sample", "plots or samples"))


def index_folders(folders: Sequence[Path], on_bad_image: str = "refuse") -> dict[Path, Images]:
    """Find the images of every folder and read their sizes from the headers.

    An image that cannot be used raises UserError ("refuse") or is left out with a warning ("skip"). Only decoding finds a file
    that is cut off after its header. So "skip" decodes every image here once, since the images of a run must not change later;
    with "refuse" the first use of such a file raises UserError.
    """
    return index_images({folder: (folder, [path.name for path in list_images(folder)]) for folder in folders}, on_bad_image)


def index_images(sources: Mapping[Source, tuple[Path, list[str]]], on_bad_image: str = "refuse") -> dict[Source, Images]:
    """As `index_folders`, for given images: source -> (folder, names below it)."""
    paths_of = {source: [folder / name for name in names] for source, (folder, names) in sources.items()}
    paths = [path for source in sources for path in paths_of[source]]
    results = list(in_threads(_size_or_reason, paths, "reading image sizes"))
    if on_bad_image == "skip":
        problems = in_threads(_decoding_problem, paths, "checking images", chunk=1)
        results = [result and (problem or result) for result, problem in zip(results, problems, strict=True)]
    _report_bad([(path, result) for path, result in zip(paths, results, strict=True) if isinstance(result, str)], on_bad_image)
    _report_own([path for path, result in zip(paths, results, strict=True) if result is None])

    index, start = {}, 0
    for source, (folder, names) in sources.items():
        own = results[start : start + len(names)]
        start += len(own)
        good = [(name, size) for name, size in zip(names, own, strict=True) if isinstance(size, tuple)]
        sizes = np.array([size for _, size in good], dtype=np.int32).reshape(-1, 2)
        index[source] = Images(folder, [name for name, _ in good], sizes)
    return index
