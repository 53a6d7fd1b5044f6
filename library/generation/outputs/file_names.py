"""What the images are called. A name that is taken is never used again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

_SEQUENTIAL = re.compile(r"im_[01]?(\d{6,})\.png")


class FileNames:
    """Candidates for the name of each image in `folder`, best first.

    im_{time}_{stage}{n:03d}_{seed}.png, where n counts the images of the run from 0 and the stage is empty, or with two
    stages 0 or 1; or im_{stage}{n:06d}.png, where n goes on after the largest number in the folder; or the source image's name.
    """

    def __init__(self, folder: Path, *, sequential: bool = False, original: bool = False, stages: bool = False) -> None:
        self.folder, self.sequential, self.original, self.stages = folder, sequential, original, stages
        self._next = self._first_free() if sequential else 0

    def _first_free(self) -> int:
        if not self.folder.is_dir():
            return 1
        # With stages the first digit of seven is the stage.
        found = (_SEQUENTIAL.fullmatch(path.name) for path in self.folder.iterdir())
        return max((int(match.group(1)) for match in found if match), default=0) + 1

    def take_number(self) -> int:
        """The number of the next image, for both its stages."""
        self._next += 1
        return self._next - 1

    def candidates(self, number: int, stage: int, seed: int | None, source: Path | None) -> Iterator[Path]:
        """Names for the image of this number."""
        mark = str(stage) if self.stages else ""
        if self.original and source is not None:
            stems = (source.stem + ("" if not copy else f"_{copy:03d}") for copy in count())
            return (self.folder / f"{stem}{'_0' if mark == '0' else ''}.png" for stem in stems)
        if self.sequential:
            return (self.folder / f"im_{mark}{number:06d}.png" for number in count(number))
        stem = f"im_{time.strftime('%Y%m%d%H%M%S')}_{mark}{number:03d}_{seed}"
        return (self.folder / f"{stem}{'' if not copy else f'_{copy}'}.png" for copy in count())
