"""Aspect-ratio buckets: into which training size an image goes, and how it is resized and cut for it.

The rule is the ecosystem's to the pixel (plain ratios, rounding down), so that a dataset behaves as people know it; sizes at
which the common implementation divides by zero are placed as well. All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from library.data.config_keys import DatasetConfig

if TYPE_CHECKING:
    from rich.table import Table

Size = tuple[int, int]
LITTLE = 0.1  # of the training area, not worth a word


@dataclass(frozen=True)
class Placement:
    """Where an image goes: resize it to `resized`, then cut out `bucket` at `crop` (left, top), which is the middle."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    ar_error: float  # ratio of the bucket minus ratio of the image
    fits: bool  # False if under a quarter of the image is used, or it is enlarged just to be one step wide: worth a word


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def bucket_list(resolution: Size, low: int, high: int, step: int) -> list[Size]:
    """Every bucket with sides from `low` to `high` and no more area than `resolution`, ascending, without bucket_no_upscale.

    Only the square may have sides outside of the bounds. `low` and `high` are multiples of `step`.
    """
    area = resolution[0] * resolution[1]
    square = max(step, int(math.sqrt(area) // step) * step)
    buckets = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


class BucketRule:
    """The bucket rule of one dataset.

    >>> from library.data.config_keys import SubsetConfig
    >>> rule = BucketRule(DatasetConfig(resolution=512, enable_bucket=True, subsets=(SubsetConfig(image_dir="x"),)))
    >>> rule.place(1920, 1080).bucket
    (640, 384)
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.resolution = config.resolution
        self.step = config.bucket_reso_steps
        self.keeps_size = config.enable_bucket and config.bucket_no_upscale
        self.buckets = [config.resolution]
        if config.enable_bucket and not self.keeps_size:
            self.buckets = bucket_list(config.resolution, *config.bucket_bounds, self.step)
        self._own_sizes = frozenset(self.buckets)
        self._ratios = np.array([width / height for width, height in self.buckets])

    def place(self, width: int, height: int) -> Placement:
        """Bucket, resized size and middle cut for an image of the given size.

        Without buckets every image is resized to cover `resolution` and cut.
        """
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width} x {height} pixels")
        if self.keeps_size:
            resized = self._size_without_enlarging(width, height)
            bucket = (resized[0] // self.step * self.step, resized[1] // self.step * self.step)
        else:
            bucket = self._nearest(width, height)
            resized = _cover((width, height), bucket)
        thin = min(bucket) == 0
        if thin:
            bucket, resized = self._enlarged_to_a_step(width, height)
        return Placement(
            bucket=bucket,
            resized=resized,
            crop=((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2),
            ar_error=bucket[0] / bucket[1] - width / height,
            fits=not thin and resized[0] * resized[1] <= 4 * bucket[0] * bucket[1],
        )

    def _nearest(self, width: int, height: int) -> Size:
        """The image's own size if it is a bucket, else the bucket of the nearest ratio, the first of equals."""
        if (width, height) in self._own_sizes:
            return width, height
        return self.buckets[int(np.argmin(np.abs(self._ratios - width / height)))]

    def _size_without_enlarging(self, width: int, height: int) -> Size:
        """bucket_no_upscale: the image's own size, or if it is too large, one of at most the area of `resolution`.

        Then one side becomes a multiple of the step, whichever keeps the ratio of the bucket nearer to the image's.
        Rounding to whole pixels may exceed the area by under a pixel of the shorter side.
        """
        area = self.resolution[0] * self.resolution[1]
        if width * height <= area:
            return width, height
        ratio, step = width / height, self.step
        wide = math.sqrt(area * ratio)
        high = area / wide
        by_width = _round(wide) // step * step
        by_width_high = _round(by_width / ratio) // step * step
        by_height = _round(high) // step * step
        by_height_wide = _round(by_height * ratio) // step * step
        if not all((by_width, by_width_high, by_height, by_height_wide)):
            return 0, 0  # so long or so small that no multiple of the step fits
        if abs(by_width / by_width_high - ratio) < abs(by_height_wide / by_height - ratio):
            return by_width, _round(by_width / ratio)
        return _round(by_height * ratio), by_height

    def _enlarged_to_a_step(self, width: int, height: int) -> tuple[Size, Size]:
        """Bucket and resized size of an image whose shorter side would be under one step: it becomes one step.

        The longer side of the bucket stays within the area of `resolution`, the rest is cut away.
        """
        step = self.step
        longest = max(step, self.resolution[0] * self.resolution[1] // step // step * step)
        scale = step / min(width, height)
        wide, high = (min(longest, _round(side * scale) // step * step) for side in (width, height))
        return (wide, high), _cover((width, height), (wide, high))


def _cover(image: Size, bucket: Size) -> Size:
    """The image's size after it was scaled so that it just covers the bucket."""
    width, height = image
    is_wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if is_wider else bucket[0] / width
    return max(bucket[0], _round(width * scale)), max(bucket[1], _round(height * scale))


@dataclass(frozen=True)
class BucketCount:
    """One line of the table of buckets."""

    bucket: Size
    images: int
    with_repeats: int


def count_buckets(placed: Iterable[tuple[Size, int]]) -> list[BucketCount]:
    """Count (bucket, repeats) of every image; ascending by bucket."""
    counts: dict[Size, list[int]] = {}
    for bucket, repeats in placed:
        entry = counts.setdefault(bucket, [0, 0])
        entry[0] += 1
        entry[1] += repeats
    return [BucketCount(bucket, *counts[bucket]) for bucket in sorted(counts)]


def bucket_table(counts: list[BucketCount], title: str | None = None) -> Table:
    """The buckets of one dataset for the screen; `rich.print` shows it."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("bucket", justify="right")
    table.add_column("images", justify="right")
    table.add_column("with repeats", justify="right")
    for count in counts:
        table.add_row(f"{count.bucket[0]} x {count.bucket[1]}", f"{count.images:,}", f"{count.with_repeats:,}")
    if len(counts) > 1:
        table.add_section()
        table.add_row("all", f"{sum(c.images for c in counts):,}", f"{sum(c.with_repeats for c in counts):,}")
    return table


def bucket_info(counts: list[BucketCount], ar_errors: Iterable[float]) -> dict:
    """The value of `ss_bucket_info`: buckets with counts (with repeats), and the mean absolute ratio error over images."""
    errors = [abs(error) for error in ar_errors]
    return {
        "buckets": {
            str(number): {"resolution": list(count.bucket), "count": count.with_repeats} for number, count in enumerate(counts)
        },
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def wrong_sides(config: DatasetConfig, step: int, model: str) -> str | None:
    """What is wrong with a dataset for a model whose sides must be multiples of `step`, with the cure; None if nothing is."""
    if config.enable_bucket:
        if config.bucket_reso_steps % step:
            given = config.bucket_reso_steps
            return f"bucket_reso_steps is {given}, and sides for {model} are multiples of {step}; make it {step} or 64"
        return None
    width, height = config.resolution
    if width % step or height % step:
        nearest = "x".join(str(max(step, round(side / step) * step)) for side in config.resolution)
        return f"resolution is {width}x{height}, and sides for {model} are multiples of {step}; make it {nearest}, say"
    return None


def better_bound(config: DatasetConfig, images: Iterable[tuple[Size, int]]) -> tuple[float, int, float] | None:
    """Whether max_bucket_reso makes images much smaller than `resolution` asks for.

    images: size and uses of each kind. Returns the share of the training area that images get on average, a better
    max_bucket_reso, and the share with that; None if there is little to gain.
    """
    if not config.enable_bucket or config.bucket_no_upscale:
        return None
    images = list(images)
    share = _share_of_area(config, images)
    bound = -(-2 * max(config.resolution) // config.bucket_reso_steps) * config.bucket_reso_steps
    if share >= 1 - LITTLE or bound <= config.max_bucket_reso:
        return None
    better = _share_of_area(config.model_copy(update={"max_bucket_reso": bound}), images)
    return (share, bound, better) if better - share >= LITTLE else None


def _share_of_area(config: DatasetConfig, images: Iterable[tuple[Size, int]]) -> float:
    """The buckets' area as a share of that of `resolution`, on average over the uses of the images."""
    rule, area, uses = BucketRule(config), 0, 0
    for size, count in images:
        area += math.prod(rule.place(*size).bucket) * count
        uses += count
    return area / (uses * math.prod(config.resolution)) if uses else 1.0
