"""`<name>-samples.png`: how the sample images changed over a run, a row for each prompt and a column for each moment."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from library.data.images import own_mark
from library.files import atomic_write
from library.sheets import contact_sheet

MOST_MOMENTS = 12  # columns of a sheet; of more moments evenly chosen ones are shown, the first and the last among them
CELL = 256


def write_sample_grid(folder: Path, name: str | None, prompts: list[str], path: Path) -> bool:
    """Draw the sheet from the images in `folder` (those of earlier parts of a resumed run too). False if there are none."""
    found = newest_images(folder, name)
    moments = chosen(sorted({moment for moment, _ in found}, key=order_in_run))
    if not moments:
        return False
    numbers = sorted({number for _, number in found})
    rows = [[opened(found.get((moment, number))) for moment in moments] for number in numbers]
    labels = [prompts[number] if number < len(prompts) else f"prompt {number}" for number in numbers]
    sheet = contact_sheet(rows, labels, [label(moment) for moment in moments], title=name, cell=CELL)
    with atomic_write(path) as temporary:
        sheet.save(temporary, pnginfo=own_mark("samples"))
    return True


def newest_images(folder: Path, name: str | None) -> dict[tuple[str, int], Path]:
    """(moment, number of the prompt) -> the newest of its images."""
    start = re.escape(f"{name}_") if name else ""
    pattern = re.compile(rf"{start}(e?\d{{6,}})_(\d{{2,}})_(\d{{14}})(?:_\d+)?\.png")
    found: dict[tuple[str, int], tuple[str, Path]] = {}
    for path in folder.glob("*.png"):
        if match := pattern.fullmatch(path.name):
            key, made = (match[1], int(match[2])), match[3]
            if key not in found or found[key][0] < made:
                found[key] = (made, path)
    return {key: path for key, (_, path) in found.items()}


def order_in_run(moment: str) -> int:
    """The number of the epoch or step; a run has only one of both."""
    return int(moment.lstrip("e"))


def chosen(moments: list[str]) -> list[str]:
    """At most MOST_MOMENTS of them, evenly spread.

    >>> len(chosen([str(number) for number in range(100)]))
    12
    """
    if len(moments) <= MOST_MOMENTS:
        return moments
    return [moments[round(column * (len(moments) - 1) / (MOST_MOMENTS - 1))] for column in range(MOST_MOMENTS)]


def label(moment: str) -> str:
    """`epoch 3` or `step 200`."""
    return f"epoch {int(moment[1:])}" if moment.startswith("e") else f"step {int(moment)}"


def opened(path: Path | None) -> Image.Image | None:
    """The image, or None if there is none or somebody took it away."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError:
        return None
