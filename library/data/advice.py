"""Advice on settings that are allowed but cost quality: images that training shrinks or enlarges too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from library.data.buckets import better_bound, better_step
from library.data.table import ImageTable
from library.errors import counted

ENLARGED = 1.5  # factor of a side; an image enlarged by more teaches blur
SHORT = 0.25  # share of batches that may hold fewer images than the batch size


def advice(table: ImageTable) -> Iterator[str]:
    """A line for each dataset that its bounds or steps shrink, or whose batches stay short, and one about enlarged images."""
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
        finer = better_step(config, sizes.items())
        if finer:
            share, step, better = finer
            yield (
                f"dataset {number + 1}: bucket_no_upscale leaves {share:.0%} of the area that images could have on average, "
                f"since sides are rounded down to multiples of bucket_reso_steps {config.bucket_reso_steps}; "
                f"--bucket_reso_steps={step} makes that {better:.0%}"
            )
        yield from _short_batches(table, number, rows)
    factors = np.where(table.repeats > 0, (table.resized / table.sizes).max(axis=1), 0)
    enlarged = int((factors > ENLARGED).sum())
    if enlarged:
        row = int(factors.argmax())
        (width, height), (wide, high) = table.sizes[row].tolist(), table.resized[row].tolist()
        yield (
            f"{counted(enlarged, 'image')} would be enlarged to more than {ENLARGED} times the file's size, which teaches blur, "
            f"such as {table.names[row]} from {width}x{height} to {wide}x{high}; --enable_bucket --bucket_no_upscale prevents it"
        )


def _short_batches(table: ImageTable, number: int, rows: np.ndarray) -> Iterator[str]:
    """A line if many batches of a dataset are not full, because images of different buckets never share one."""
    size = table.configs[number].batch_size
    uses = np.bincount(table.bucket[rows], weights=table.repeats[rows]).astype(np.int64)
    uses = uses[uses > 0]
    batches, short = int((-(-uses // size)).sum()), int((uses % size > 0).sum())
    if short > max(1, SHORT * batches):
        yield (
            f"dataset {number + 1}: {short} of {batches} batches hold fewer than {size} images, since images of {len(uses)} "
            f"training sizes never share one; num_repeats {size} with fewer epochs fills them"
        )
