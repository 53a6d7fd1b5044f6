"""Which images are held out for validation. This depends on their names and the seed alone, not on their order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from library.data.config_keys import DatasetConfig, SubsetConfig, without
from library.errors import UserError
from library.option_traits import fields_with
from library.safe_text import bytes_of


def hold_out(
    configs: Sequence[DatasetConfig], dataset: np.ndarray, is_reg: np.ndarray, path: Callable[[int], Path], seed: int
) -> np.ndarray:
    """(n,) bool: the images to validate with, which are not trained on.

    dataset, is_reg: (n,) dataset number of each image, and whether it is a regularisation image; path(row) is its file.
    Of each dataset round(validation_split * images) are chosen, at least one and never all, by a checksum of the file name
    without folder and suffix. So images of one name (one motif in two sizes, say) stay together. A file that is held out
    in one dataset is held out in all. `seed` is used where validation_seed is not given.
    """
    held = np.zeros(len(dataset), dtype=bool)
    for number, config in enumerate(configs):
        rows = np.flatnonzero((dataset == number) & ~is_reg).tolist()
        if config.validation_split and len(rows) > 1:
            own_seed = seed if config.validation_seed is None else config.validation_seed
            held[_chosen({row: path(row).stem for row in rows}, config.validation_split, own_seed)] = True
    if held.any():
        files = {_real_path(path(row)) for row in np.flatnonzero(held).tolist()}
        held |= np.array([_real_path(path(row)) in files for row in range(len(held))])
    elif any(config.validation_split for config in configs):
        raise UserError("validation_split holds out no image, since no dataset has two of them; leave it out, or add images")
    return held


def _chosen(stems: dict[int, str], share: float, seed: int) -> list[int]:
    """Rows, name by name in the order of the names' checksums, until the share is reached; never all rows."""
    wanted = min(max(1, round(len(stems) * share)), len(stems) - 1)
    by_name: dict[str, list[int]] = {}
    for row, stem in stems.items():
        by_name.setdefault(stem, []).append(row)
    chosen: list[int] = []
    for stem in sorted(by_name, key=lambda stem: hashlib.sha256(bytes_of(f"{seed}/held out/{stem}")).digest()):
        if len(chosen) < wanted and len(chosen) + len(by_name[stem]) < len(stems):
            chosen += by_name[stem]
    return chosen


def _real_path(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def without_augmentation(subset: SubsetConfig) -> SubsetConfig:
    """A subset's settings without any key that changes an image or its caption at each use."""
    kept = {key: getattr(subset, key) for key in fields_with(type(subset), held_out=(True,))}
    return without(subset, "caption", "dropout", "pixels", "mirror").model_copy(update={"is_reg": False, **kept})
