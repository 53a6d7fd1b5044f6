"""All images of a run in one table: path, caption, bucket and repeats of each.

Columns are arrays, so that 100,000 images take little memory and reach a loader process quickly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.buckets import BucketAssignment, BucketRule
from library.data.captions import read_caption
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.holdout import hold_out
from library.data.index import Images, in_threads, index_folders, index_images
from library.data.masks import find_masks, is_masked
from library.data.metadata_file import Metadata, read_metadata
from library.errors import UserError, counted, listed
from library.safe_text import as_unicode, is_unicode

log = logging.getLogger(__name__)

MAX_USES = 100_000_000  # in an epoch; the order of an epoch takes 4 bytes for each


@dataclass(frozen=True)
class Subset:
    """A subset's settings and its rows [start, end) of the table."""

    config: SubsetConfig
    dataset: int
    start: int
    end: int
    tags: dict[str, int] | None = None  # tag -> images, of its metadata file; None without such a file


@dataclass(frozen=True)
class Bucket:
    """The images of one dataset that are trained at one size."""

    dataset: int
    size: tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class ImageTable:
    """n images. A row is an image in one subset; sizes are (width, height) and corners (left, top)."""

    configs: list[DatasetConfig]
    subsets: list[Subset]
    buckets: list[Bucket]  # sorted by dataset, width, height
    names: list[str]
    captions: list[str]  # raw: as in the file, or the class tokens
    subset: np.ndarray  # (n,) int32
    bucket: np.ndarray  # (n,) int32
    sizes: np.ndarray  # (n, 2) int32: the upright image
    resized: np.ndarray  # (n, 2) int32
    corner: np.ndarray  # (n, 2) int32: of the centre crop
    ar_error: np.ndarray  # (n,) float32: the bucket's aspect ratio minus the image's
    repeats: np.ndarray  # (n,) int32: uses an epoch; 0 for those held out
    held_out: np.ndarray  # (n,) bool: never trained on
    masks: list[Path | None] | None  # mask file of each image; None if no image has one

    def __len__(self) -> int:
        return len(self.names)

    def config(self, row: int) -> SubsetConfig:
        return self.subsets[self.subset[row]].config

    def path(self, row: int) -> Path:
        return self.config(row).image_dir / self.names[row]

    def mask(self, row: int) -> Path | None:
        return self.masks[row] if self.masks else None

    def has_masks(self) -> bool:
        """Whether any image has a mask, be it a file or its alpha channel."""
        return any(is_masked(subset.config) for subset in self.subsets)

    def bucket_size(self, row: int) -> tuple[int, int]:
        return self.buckets[self.bucket[row]].size

    def interpolation(self, row: int) -> str | None:
        subset = self.subsets[self.subset[row]]
        return subset.config.resize_interpolation or self.configs[subset.dataset].resize_interpolation

    def is_reg(self) -> np.ndarray:
        """(n,) bool: regularisation images."""
        return np.array([subset.config.is_reg for subset in self.subsets])[self.subset]

    def validated(self) -> np.ndarray:
        """(n,) bool: the rows to validate with. A held-out image is validated in the datasets that have a validation_split."""
        splits = np.array([config.validation_split > 0 for config in self.configs])
        return self.held_out & ~self.is_reg() & splits[self.dataset()]

    def dataset(self) -> np.ndarray:
        """(n,) int: the dataset of each row."""
        return np.array([subset.dataset for subset in self.subsets])[self.subset]


def build_table(configs: Sequence[DatasetConfig], on_bad_image: str = "refuse", seed: int = 0) -> ImageTable:
    """Index every image, read its caption and assign it to a bucket. Raises UserError if a dataset has no image to train on.

    `seed` chooses the images held out for validation where validation_seed is not given.
    """
    every = [subset for config in configs for subset in config.subsets]
    metadata = [read_metadata(subset, on_bad_image) if subset.metadata_file else None for subset in every]
    in_metadata = {_source(s): (s.image_dir, found.names) for s, found in zip(every, metadata, strict=True) if found}
    folders = [subset.image_dir for subset in every if not subset.metadata_file]
    index: dict[tuple[Path | None, Path], Images] = {
        (None, folder): found for folder, found in index_folders(folders, on_bad_image).items()
    }
    index |= index_images(in_metadata, on_bad_image)
    images = [index[_source(subset)] for subset in every]
    numbers = [number for number, config in enumerate(configs) for _ in config.subsets]
    subsets: list[Subset] = []
    for subset, number, part, found in zip(every, numbers, images, metadata, strict=True):
        start = subsets[-1].end if subsets else 0
        subsets.append(Subset(subset, number, start, start + len(part), found.tags if found else None))
    sizes = np.concatenate([part.sizes for part in images])
    row_subset = np.repeat(np.arange(len(subsets), dtype=np.int32), [len(part) for part in images])
    names = [name for part in images for name in part.names]
    buckets, columns = _assign_buckets(list(configs), subsets, row_subset, sizes, names)
    held_out = hold_out(
        configs,
        dataset=np.array([subset.dataset for subset in subsets])[row_subset],
        is_reg=np.array([subset.config.is_reg for subset in subsets])[row_subset],
        path=lambda row: subsets[row_subset[row]].config.image_dir / names[row],
        seed=seed,
    )
    return ImageTable(
        configs=list(configs),
        subsets=subsets,
        buckets=buckets,
        names=names,
        captions=[text for own in zip(every, images, metadata, strict=True) for text in _captions(*own)],
        subset=row_subset,
        sizes=sizes,
        repeats=np.concatenate([_repeats(subsets, number, held_out) for number in range(len(configs))]),
        held_out=held_out,
        masks=_masks(subsets, images),
        **columns,
    )


def _source(subset: SubsetConfig) -> tuple[Path | None, Path]:
    """The key of a subset's images: two datasets may read one metadata file with different folders."""
    return subset.metadata_file, subset.image_dir


def _masks(subsets: list[Subset], images: list[Images]) -> list[Path | None] | None:
    if not any(subset.config.conditioning_data_dir for subset in subsets):
        return None
    masks: list[Path | None] = []
    for subset, part in zip(subsets, images, strict=True):
        masks += find_masks(subset.config, part.names, part.sizes) if subset.config.conditioning_data_dir else [None] * len(part)
    return masks


def _captions(subset: SubsetConfig, images: Images, metadata: Metadata | None) -> list[str]:
    """The raw caption of each image, as Unicode."""
    found = [metadata.captions[name] for name in images.names] if metadata else _captions_beside(subset, images)
    broken = [name for name, caption in zip(images.names, found, strict=True) if not is_unicode(caption)]
    if broken:
        log.warning(
            "%s: %s with half an emoji or other letters that are no Unicode, which are left out (%s first)",
            subset.metadata_file or subset.image_dir,
            counted(len(broken), "caption"),
            broken[0],
        )
    return [as_unicode(caption, instead="") for caption in found]


def _captions_beside(subset: SubsetConfig, images: Images) -> list[str]:
    """Captions from the files beside the images. Warns where neither a caption file nor class_tokens exist."""
    found = list(in_threads(lambda name: read_caption(subset.image_dir / name, subset), images.names, "reading captions"))
    missing = [name for name, caption in zip(images.names, found, strict=True) if caption is None]
    if missing:
        log.warning(
            "%s: %d of %d images without a %s file, and the subset has no class_tokens (%s first); their caption is empty",
            subset.image_dir,
            len(missing),
            len(found),
            subset.caption_extension,
            missing[0],
        )
    return [caption or "" for caption in found]


def _assign_buckets(
    configs: list[DatasetConfig], subsets: list[Subset], row_subset: np.ndarray, sizes: np.ndarray, names: list[str]
) -> tuple[list[Bucket], dict[str, np.ndarray]]:
    """The buckets that hold images, and the columns of the table that follow from them."""
    rules = [BucketRule(config) for config in configs]
    keys = [(subsets[part].dataset, *size) for part, size in zip(row_subset.tolist(), sizes.tolist(), strict=True)]
    # Images of one dataset and size share an assignment.
    by_key: dict[tuple[int, int, int], BucketAssignment] = {key: rules[key[0]].assign(*key[1:]) for key in dict.fromkeys(keys)}
    _warn_of_misfits([(name, key, by_key[key]) for name, key in zip(names, keys, strict=True) if not by_key[key].fits])
    bucket_of = {key: Bucket(key[0], assigned.bucket) for key, assigned in by_key.items()}
    buckets = sorted(set(bucket_of.values()), key=lambda bucket: (bucket.dataset, bucket.size))
    number = {bucket: position for position, bucket in enumerate(buckets)}
    rows = {key: (number[bucket_of[key]], *assigned.resized, *assigned.corner) for key, assigned in by_key.items()}
    table = np.array([rows[key] for key in keys], dtype=np.int32).reshape(-1, 5)
    ar_error = np.array([by_key[key].ar_error for key in keys], dtype=np.float32)
    return buckets, {"bucket": table[:, 0], "resized": table[:, 1:3], "corner": table[:, 3:5], "ar_error": ar_error}


def _warn_of_misfits(misfits: list[tuple[str, tuple[int, int, int], BucketAssignment]]) -> None:
    if misfits:
        named = [f"{name} ({key[1]}x{key[2]} to {fit.bucket[0]}x{fit.bucket[1]})" for name, key, fit in misfits]
        log.warning(
            "cropped or enlarged too much: %s, %s",
            counted(len(misfits), "image"),
            listed(named, separator="; "),
        )


def _repeats(subsets: list[Subset], dataset: int, held_out: np.ndarray) -> np.ndarray:
    """How often each row of a dataset is used in an epoch.

    Held-out images: never. Training images: num_repeats of their subset. Regularisation images together are used as often as
    the training images: in order, each num_repeats times until that total is reached, then one more each in turn.
    """
    own = [subset for subset in subsets if subset.dataset == dataset]
    repeats = np.concatenate([np.full(s.end - s.start, s.config.num_repeats, dtype=np.int32) for s in own])
    is_reg = np.concatenate([np.full(s.end - s.start, s.config.is_reg) for s in own])
    held = np.concatenate([held_out[s.start : s.end] for s in own])
    repeats[held] = 0
    total = int(repeats[~is_reg].sum(dtype=np.int64))
    if total > MAX_USES:
        raise UserError(
            f"dataset {dataset + 1}: num_repeats make {total:,} uses of images an epoch, more than {MAX_USES:,}; lower them"
        )
    if not total:
        raise UserError(f"dataset {dataset + 1} has no images to train on, only is_reg subsets or none usable; add a subset")
    is_reg &= ~held
    if is_reg.any():
        repeats[is_reg] = balanced(repeats[is_reg], total)
        unused = int((repeats[is_reg] == 0).sum())
        if unused:
            log.warning(
                "dataset %d: left out %d of %d regularisation images: %d uses match those of the training images",
                dataset + 1,
                unused,
                int(is_reg.sum()),
                total,
            )
    return repeats


def balanced(repeats: np.ndarray, total: int) -> np.ndarray:
    """`repeats` of regularisation images changed so that their sum is `total`.

    >>> balanced(np.array([2, 2, 2]), 3).tolist(), balanced(np.array([2, 2, 2]), 8).tolist()
    ([2, 1, 0], [3, 3, 2])
    """
    before = np.cumsum(repeats, dtype=np.int64) - repeats
    first = np.clip(total - before, 0, repeats)
    rounds, rest = divmod(total - int(first.sum()), len(repeats))
    return (first + rounds + (np.arange(len(repeats)) < rest)).astype(np.int32)
