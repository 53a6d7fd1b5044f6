"""The order of an epoch: which images make which batch. It depends on the seed and the epoch alone."""

from __future__ import annotations

import hashlib

import numpy as np

from library.data.table import ImageTable


def shuffler(*parts: object) -> np.random.RandomState:
    """A generator seeded with the given values. RandomState gives the same numbers in every version of NumPy."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.RandomState([int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)])


class EpochOrder:
    """order[position]: table rows of the batch at that position, (<= batch_size,) int32."""

    def __init__(self, rows: np.ndarray, ends: np.ndarray, sequence: np.ndarray) -> None:
        self.rows, self.ends, self.sequence = rows, ends, sequence

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, position: int) -> np.ndarray:
        batch = self.sequence[position]
        return self.rows[self.ends[batch - 1] if batch else 0 : self.ends[batch]]


class BatchOrder:
    """Divides the images of each bucket into batches, in another order each epoch; a bucket's last batch may be short."""

    def __init__(self, table: ImageTable, seed: int) -> None:
        self.seed = seed
        by_bucket = np.argsort(table.bucket, kind="stable").astype(np.int32)
        self.rows = np.repeat(by_bucket, table.repeats[by_bucket])  # bucket by bucket, each row `repeats` times
        counts = np.bincount(table.bucket[self.rows], minlength=len(table.buckets))
        self.bucket_ends = np.cumsum(counts)
        ends = []
        for bucket, end, count in zip(table.buckets, self.bucket_ends, counts, strict=True):
            size = table.configs[bucket.dataset].batch_size
            ends += [min(end, end - count + first + size) for first in range(0, count, size)]
        self.batch_ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.batch_ends)

    def of_epoch(self, epoch: int) -> EpochOrder:
        """The rows of every bucket shuffled, then the batches of all buckets."""
        random = shuffler(self.seed, "order", epoch)
        rows = self.rows.copy()
        start = 0
        for end in self.bucket_ends:
            rows[start:end] = rows[start:end][random.permutation(end - start)]
            start = end
        return EpochOrder(rows, self.batch_ends, random.permutation(len(self)))
