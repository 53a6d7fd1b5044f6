"""Facts about the datasets: counts, buckets and tags, for the console and for the metadata of the trained file."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from library.data.buckets import BucketCount, bucket_info, bucket_table, count_buckets
from library.data.captions import count_tags
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.table import ImageTable
from library.safe_text import as_unicode


@dataclass(frozen=True)
class SubsetFacts:
    config: SubsetConfig
    folder: str  # base name of image_dir, or of the metadata file
    img_count: int  # usable images that are not held out, without repeats


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about one dataset; the metadata keys of the same names have the same meaning."""

    config: DatasetConfig
    subsets: list[SubsetFacts]
    num_train_images: int  # with repeats
    num_reg_images: int  # with num_repeats as given; `table._repeats` matches them to the training images
    num_validation_images: int  # held out, without repeats
    buckets: list[BucketCount]  # ascending; used images only
    bucket_info: dict | None  # value of ss_bucket_info; None with buckets off
    mean_img_ar_error: float  # over the images in use, without repeats
    tag_frequency: dict[str, dict[str, int]]  # folder -> tag -> captions


def describe(table: ImageTable) -> list[DatasetFacts]:
    """Facts of every dataset, in order."""
    return [_describe(table, number) for number in range(len(table.configs))]


def _source(subset: SubsetConfig) -> str:
    return as_unicode((subset.metadata_file or subset.image_dir).name)


def _describe(table: ImageTable, number: int) -> DatasetFacts:
    subsets = [subset for subset in table.subsets if subset.dataset == number]
    counts = {True: 0, False: 0}
    tags: dict[str, dict[str, int]] = {}
    sizes: list[int] = []
    for subset in subsets:
        own = range(subset.start, subset.end)
        kept = [row for row in own if not table.held_out[row]] if table.held_out.any() else own
        sizes.append(len(kept))
        counts[subset.config.is_reg] += len(kept) * subset.config.num_repeats
        found = tags.setdefault(_source(subset.config), {})
        counted = count_tags(table.captions[row] for row in kept) if subset.tags is None else subset.tags
        for tag, count in counted.items():
            found[tag] = found.get(tag, 0) + count
    rows = np.flatnonzero((table.dataset() == number) & (table.repeats > 0))
    buckets = count_buckets((table.bucket_size(row), int(table.repeats[row])) for row in rows.tolist())
    info = bucket_info(buckets, table.ar_error[rows].tolist())
    return DatasetFacts(
        config=table.configs[number],
        subsets=[SubsetFacts(s.config, _source(s.config), size) for s, size in zip(subsets, sizes, strict=True)],
        num_train_images=counts[False],
        num_reg_images=counts[True],
        num_validation_images=int((table.validated() & (table.dataset() == number)).sum()),
        buckets=buckets,
        bucket_info=info if table.configs[number].enable_bucket else None,
        mean_img_ar_error=info["mean_img_ar_error"],
        tag_frequency=tags,
    )


def bucket_text(facts: list[DatasetFacts]) -> str:
    """A table of buckets for every dataset, as text to print."""
    text = io.StringIO()
    console = Console(file=text, width=100)
    for number, dataset in enumerate(facts, start=1):
        width, height = dataset.config.resolution
        title = f"dataset {number}: {width} x {height}, batch size {dataset.config.batch_size}"
        console.print(bucket_table(dataset.buckets, title))
    return text.getvalue().rstrip()
