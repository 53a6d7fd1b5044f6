"""Images are written by a thread of their own, while the next batch is drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.files import write_new
from library.safe_text import as_unicode

MAX_WAITING = 16  # images in memory that are not yet written; with more the drawing waits


class ImageWriter:
    """Writes images in the background, in order. Leaving the `with` block waits until all are on the disk."""

    def __init__(self) -> None:
        self.saved: list[Path] = []
        self._thread = ThreadPoolExecutor(1, "saving")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def add(
        self, image: Image.Image, names: Iterable[Path], text: Callable[[], dict[str, str]],
        then: Callable[[Path], object] | None = None,
    ) -> None:  # fmt: skip
        """Save `image` under the first free one of `names` with the fields of `text`, which is called in the thread.

        then: called there with the path. Raises `UserError` if an earlier image could not be written.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= MAX_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._save, image, names, text, then))

    def wait(self) -> None:
        """Until everything given so far is on the disk."""
        while self._waiting:
            self._waiting.popleft().result()

    def _save(
        self, image: Image.Image, names: Iterable[Path], text: Callable[[], dict[str, str]],
        then: Callable[[Path], object] | None,
    ) -> None:  # fmt: skip
        info = PngInfo()
        for key, value in text().items():
            info.add_text(key, as_unicode(value))
        path = write_new(names, lambda temporary: image.save(temporary, pnginfo=info))
        self.saved.append(path)
        if then is not None:
            then(path)
