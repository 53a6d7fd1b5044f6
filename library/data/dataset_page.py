"""`debug_dataset.html`: every image as it will be trained, with its captions, its tokens and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from library.data.advice import ENLARGED
from library.data.captions import caption_is_fixed
from library.data.config_keys import SubsetConfig
from library.data.dataset import TrainingDataset, Use
from library.data.index import in_threads
from library.data.page_data import data_tables, token_table
from library.data.table import ImageTable
from library.errors import UserError, one_line
from library.files import sha256_of_file
from library.option_traits import fields_with
from library.pages.images import save_small_copy
from library.pages.page import folder_of, write_page

LONGEST_SIDE = 320  # pixels of an image on the page
MAX_CAPTIONS = 3  # of an image, where they vary from use to use
MUCH_CUT = 0.25  # share of an image that is cut away, above which it is reported
MAX_NAMED = 3  # of the files that are the same as one
IGNORED = (214, 40, 86)  # colour of what a mask takes out
IGNORED_OPACITY = 0.6

UseIndex = tuple[int, int, int]  # epoch, position of the batch in it, slot in the batch


def write_dataset_page(dataset: TrainingDataset, path: Path) -> None:
    """Write the page at `path`, and its images beside it: each image's first use, or its middle where it has none.

    An image that cannot be read is on the page with the reason. Raises UserError if the page cannot be written.
    """
    folder, table = folder_of(path), dataset.table
    folder.mkdir(parents=True, exist_ok=True)
    uses = first_uses(dataset, MAX_CAPTIONS)
    duplicates = duplicates_of(table)

    def row_facts(row: int) -> dict[str, Any]:
        return describe(dataset, row, uses[row], duplicates.get(row, []), folder)

    rows = list(in_threads(row_facts, range(len(table)), "drawing images", chunk=4))
    remove_others(folder, len(table))
    tokens = dataset.tokenizer
    used = [row["captions"][0][1] for row in rows if row["repeats"]]
    write_page(path, "dataset", path.stem, {
        "folder": folder.name,
        "rows": rows,
        "buckets": [[*bucket.size, bucket.dataset + 1] for bucket in table.buckets],
        "subsets": [subset_facts(subset.config, path.parent) for subset in table.subsets],
        "batches": dataset.num_batches,
        "data": {**data_tables(dataset), "tokens": token_table(used, tokens.limit, len(used)) if tokens and used else None},
    })  # fmt: skip


def subset_facts(config: SubsetConfig, page_folder: Path) -> dict[str, Any]:
    """What the page shows of a folder: what differs from use to use, and how a link from the page to its files begins."""
    varies = [key for key in fields_with(type(config), varies=("caption", "dropout", "pixels", "mirror")) if getattr(config, key)]
    try:
        link = Path(os.path.relpath(config.image_dir, page_folder)).as_posix()
    except ValueError:  # on another drive of Windows
        link = None
    return {"folder": str(config.metadata_file or config.image_dir), "link": link, "reg": config.is_reg, "varies": varies}


def first_uses(dataset: TrainingDataset, count: int) -> list[list[UseIndex]]:
    """Of each row its first `count` uses in the first `count` epochs; fewer of a row that is used less."""
    found: list[list[UseIndex]] = [[] for _ in range(len(dataset.table))]
    for epoch in range(1, count + 1):
        order = dataset.epoch_order(epoch)
        for position in range(len(order)):
            for slot, row in enumerate(order[position].tolist()):
                if len(found[row]) < count:
                    found[row].append((epoch, position, slot))
    return found


def describe(
    dataset: TrainingDataset, row: int, uses: Sequence[UseIndex], duplicates: Sequence[str], folder: Path
) -> dict[str, Any]:
    """What the page shows of one image, of which a copy is written to `folder`.

    uses: the first ones; duplicates: names of the same file. captions: [text, tokens, how much of the text is read].
    """
    table, number = dataset.table, f"{row:06d}"
    facts: dict[str, Any] = {
        "file": table.names[row],
        "subset": int(table.subset[row]),
        "bucket": int(table.bucket[row]),
        "size": table.sizes[row].tolist(),
        "repeats": int(table.repeats[row]),
        "image": None,
        "captions": [],
        "problems": [],
    }
    captions = [table.captions[row]]
    try:
        use = dataset.use(*uses[0]) if uses else dataset.unchanged(row)
    except UserError as error:
        facts["problems"].append(["unreadable", one_line(error)])
    else:
        facts["image"] = f"{number}.webp"
        save_small_copy(Image.fromarray(use.pixels), folder / f"{number}.webp", LONGEST_SIDE)
        if use.mask is not None:
            facts["mask"], facts["counts"] = f"{number}-mask.webp", round(float(use.mask.mean()) / 255, 3)
            save_small_copy(ignored(use), folder / f"{number}-mask.webp", LONGEST_SIDE)
        count = 1 if caption_is_fixed(table.config(row)) else MAX_CAPTIONS
        captions = [use.caption, *(dataset.caption(*index) for index in uses[1:count])]
    facts["captions"] = [measured(dataset, caption) for caption in captions]
    facts["problems"] += problems_of(dataset, row, facts, duplicates)
    return facts


def ignored(use: Use) -> Image.Image:
    """What the mask takes out of an image, as a colour to lay over it."""
    assert use.mask is not None  # called where there is one
    over = np.empty((*use.mask.shape, 4), np.uint8)
    over[..., :3], over[..., 3] = IGNORED, np.rint((255 - use.mask) * IGNORED_OPACITY)
    return Image.fromarray(over, "RGBA")


def measured(dataset: TrainingDataset, caption: str) -> list[Any]:
    """[text, tokens, characters that are read]; without a tokenizer nothing is counted."""
    if dataset.tokenizer is None:
        return [caption, 0, len(caption)]
    count = dataset.tokenizer.count(caption)
    read = len(dataset.tokenizer.read_part(caption)) if count > dataset.tokenizer.limit else len(caption)
    return [caption, count, utf16_length(caption[:read])]


def utf16_length(text: str) -> int:
    """As JavaScript counts letters: an emoji is two.

    >>> utf16_length("a😀")
    3
    """
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def problems_of(dataset: TrainingDataset, row: int, facts: dict[str, Any], duplicates: Sequence[str]) -> Iterable[list[Any]]:
    """[name of a problem, how much]; library/pages/assets/words.js has the text of each."""
    table = dataset.table
    (width, height), (wide, high) = table.resized[row].tolist(), table.bucket_size(row)
    enlarged = float((table.resized[row] / table.sizes[row]).max())
    cut_away = 1 - min(width, wide) * min(height, high) / (width * height)
    if enlarged > ENLARGED:
        yield ["enlarged", round(enlarged, 2)]
    if cut_away > MUCH_CUT:
        yield ["cut_away", round(cut_away, 3)]
    if not table.captions[row].strip():
        yield ["no_caption", None]
    if dataset.tokenizer is not None and (longest := max(count for _, count, _ in facts["captions"])) > dataset.tokenizer.limit:
        yield ["too_long", [longest, dataset.tokenizer.limit]]
    if facts.get("counts") == 0:
        yield ["nothing_counts", None]
    if duplicates:
        yield ["duplicate", [*duplicates[:MAX_NAMED], *(["…"] if len(duplicates) > MAX_NAMED else [])]]
    if table.held_out[row]:
        yield ["held_out", None]
    elif not table.repeats[row]:
        yield ["unused", None]


def duplicates_of(table: ImageTable) -> dict[int, list[str]]:
    """Rows whose file is, byte for byte, that of another row of their dataset -> the names of those others."""
    dataset = table.dataset()
    alike = [
        same
        for same_size in grouped(range(len(table)), lambda row: (int(dataset[row]), table.path(row).stat().st_size))
        for same in grouped(same_size, lambda row: sha256_of_file(table.path(row)))
    ]
    return {row: [table.names[other] for other in rows if other != row] for rows in alike for row in rows}


def grouped(rows: Iterable[int], key: Callable[[int], Any]) -> list[list[int]]:
    """Rows that have their key in common with others; a file that cannot be read has none."""
    groups: dict[Any, list[int]] = {}
    for row in rows:
        with suppress(OSError):
            groups.setdefault(key(row), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def remove_others(folder: Path, rows: int) -> None:
    """Remove the images of an earlier, larger dataset."""
    for path in folder.glob("[0-9]*.webp"):
        number = path.stem.partition("-")[0]
        if number.isdecimal() and int(number) >= rows:
            path.unlink(missing_ok=True)
