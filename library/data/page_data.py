"""What a page says of a dataset: buckets, folders, tags, and how long the captions are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from library.data.dataset import TrainingDataset
from library.data.facts import DatasetFacts

TAGS = 24


def data_tables(dataset: TrainingDataset) -> dict[str, Any]:
    """Buckets, folders and counts of each dataset, and the most frequent tags of all."""
    facts = dataset.describe()
    tags: Counter[str] = Counter()
    for one in facts:
        for counts in one.tag_frequency.values():
            tags.update(counts)
    return {
        "datasets": [described(one, number) for number, one in enumerate(facts)],
        "tags": [[tag, count] for tag, count in tags.most_common(TAGS) if count > 1],
    }


def described(facts: DatasetFacts, number: int) -> dict[str, Any]:
    """One dataset."""
    return {
        "number": number + 1,
        "size": list(facts.config.resolution),
        "batch": facts.config.batch_size,
        "images": facts.num_train_images,
        "reg": facts.num_reg_images,
        "held_out": facts.num_validation_images,
        "buckets": [[*bucket.bucket, bucket.images, bucket.with_repeats] for bucket in facts.buckets],
        "subsets": [
            {
                "folder": subset.folder, "images": subset.img_count, "repeats": subset.config.num_repeats,
                "reg": subset.config.is_reg,
            }
            for subset in facts.subsets
        ],
    }  # fmt: skip


def token_table(lengths: Sequence[int], limit: int, images: int) -> dict[str, Any]:
    """Lengths of captions in ranges. images: of which these are the captions, or some of them."""
    return {
        "limit": limit, "counted": len(lengths), "images": images, "longest": max(lengths),
        "cut": sum(length > limit for length in lengths), "ranges": ranges(lengths),
    }  # fmt: skip


def ranges(lengths: Sequence[int]) -> list[list[int]]:
    """[from, to, how many] of at most eight ranges of equal width.

    >>> ranges([0, 3, 12])
    [[0, 4, 2], [5, 9, 0], [10, 14, 1]]
    """
    width = max(5, math.ceil((max(lengths) + 1) / 8 / 5) * 5)
    counts = Counter(length // width for length in lengths)
    return [[part * width, part * width + width - 1, counts[part]] for part in range(max(counts) + 1)]
