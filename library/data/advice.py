"""Advice on settings that are allowed but cost quality: images that training shrinks or enlarges too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from library.data.buckets import better_bound
from library.data.table import ImageTable

ENLARGED = 1.5  # factor of a side; an image enlarged by more teaches blur


def advice(table: ImageTable) -> Iterator[str]:
    """A line for each dataset that max_bucket_reso shrinks, and one about images that are enlarged."""
    for number, config in enumerate(table.configs):
        rows = np.flatnonzero((table.dataset() == number) & (table.repeats > 0))
        sizes: Counter[tuple[int, int]] = Counter()
        for (width, height), count in zip(table.sizes[rows].tolist(), table.repeats[rows].tolist(), strict=True):
            sizes[width, height] += count
        found = better_bound(config, sizes.items())
        if found:
            share, bound, better = found
            width, height = config.resolution
            yield (
                f"dataset {number + 1}: images get {share:.0%} of the area of resolution {width}x{height} on average, since no "
                f"side is longer than max_bucket_reso {config.max_bucket_reso}; --max_bucket_reso={bound} makes that {better:.0%}"
            )
    factors = np.where(table.repeats > 0, (table.resized / table.sizes).max(axis=1), 0)
    enlarged = int((factors > ENLARGED).sum())
    if enlarged:
        row = int(factors.argmax())
        (width, height), (wide, high) = table.sizes[row].tolist(), table.resized[row].tolist()
        yield (
            f"{enlarged} images are enlarged to more than {ENLARGED} times their size, which teaches blur, such as "
            f"{table.names[row]} from {width}x{height} to {wide}x{high}; --enable_bucket --bucket_no_upscale keeps their size"
        )
