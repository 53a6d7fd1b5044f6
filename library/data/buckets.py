"""Aspect-ratio buckets: the training size of an image, and how the image is resized and cropped to it.

The rule equals sd-scripts' to the pixel (plain ratios, rounding down), so that datasets give the buckets that users expect. It
also covers sizes at which that implementation divides by zero. All sizes are (width, height) in pixels.
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
MIN_GAIN = 0.1  # share of the training area; a smaller loss is not reported


@dataclass(frozen=True)
class BucketAssignment:
    """The bucket of an image: resize the image to `resized`, then crop `bucket` at `corner` (left, top), in the centre."""

    bucket: Size
    resized: Size
    corner: tuple[int, int]
    ar_error: float  # aspect ratio of the bucket minus that of the image
    fits: bool  # False if less than a quarter of the image is used, or if it is enlarged to be one step wide


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def bucket_list(resolution: Size, low: int, high: int, step: int) -> list[Size]:
    """The buckets without bucket_no_upscale, ascending: sides from `low` to `high`, no more area than `resolution`.

    Only the square bucket may have sides out of these bounds. `low` and `high` are multiples of `step`.
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
    >>> rule.assign(1920, 1080).bucket
    (640, 384)
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.resolution = config.resolution
        self.step = config.bucket_reso_steps
        self.keeps_size = config.enable_bucket and config.bucket_no_upscale
        self.buckets = [config.resolution]
        if config.enable_bucket and not self.keeps_size:
            self.buckets = bucket_list(config.resolution, *config.bucket_bounds, self.step)
        self._bucket_set = frozenset(self.buckets)
        self._ratios = np.array([width / height for width, height in self.buckets])

    def assign(self, width: int, height: int) -> BucketAssignment:
        """The bucket, resized size and centre crop of an image of the given size.

        Without enable_bucket every image is resized to cover `resolution` and cropped to it.
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
        return BucketAssignment(
            bucket=bucket,
            resized=resized,
            corner=((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2),
            ar_error=bucket[0] / bucket[1] - width / height,
            fits=not thin and resized[0] * resized[1] <= 4 * bucket[0] * bucket[1],
        )

    def _nearest(self, width: int, height: int) -> Size:
        """The image's own size if it is a bucket, else the first bucket of the nearest aspect ratio."""
        if (width, height) in self._bucket_set:
            return width, height
        return self.buckets[int(np.argmin(np.abs(self._ratios - width / height)))]

    def _size_without_enlarging(self, width: int, height: int) -> Size:
        """The resized size with bucket_no_upscale: the image's own, or one of at most the area of `resolution`.

        In the second case one side becomes a multiple of the step: the side that keeps the ratio nearer to the image's.
        Rounding to whole pixels may exceed the area by less than one row or column of pixels.
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
            return 0, 0  # a side is shorter than the step
        if abs(by_width / by_width_high - ratio) < abs(by_height_wide / by_height - ratio):
            return by_width, _round(by_width / ratio)
        return _round(by_height * ratio), by_height

    def _enlarged_to_a_step(self, width: int, height: int) -> tuple[Size, Size]:
        """Bucket and resized size of an image whose shorter side would be less than one step: that side becomes one step.

        The longer side of the bucket stays within the area of `resolution`; the rest of the image is cropped away.
        """
        step = self.step
        longest = max(step, self.resolution[0] * self.resolution[1] // step // step * step)
        scale = step / min(width, height)
        wide, high = (min(longest, _round(side * scale) // step * step) for side in (width, height))
        return (wide, high), _cover((width, height), (wide, high))


def _cover(image: Size, bucket: Size) -> Size:
    """The size of the image scaled so that it just covers the bucket."""
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


def count_buckets(used: Iterable[tuple[Size, int]]) -> list[BucketCount]:
    """Count (bucket, repeats) of every image; ascending by bucket."""
    counts: dict[Size, list[int]] = {}
    for bucket, repeats in used:
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
    """The error of a dataset for a model whose sides must be multiples of `step`, with the cure; None if it has none."""
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
    """A better max_bucket_reso for a dataset whose images the present one makes much smaller than `resolution`.

    images: (size, number of uses). Returns the share of the training area that images get on average, the better
    max_bucket_reso, and the share with it; None if the gain is less than MIN_GAIN.
    """
    if not config.enable_bucket or config.bucket_no_upscale:
        return None
    images = list(images)
    share = _share_of_area(config, images)
    bound = -(-2 * max(config.resolution) // config.bucket_reso_steps) * config.bucket_reso_steps
    if share >= 1 - MIN_GAIN or bound <= config.max_bucket_reso:
        return None
    better = _share_of_area(config.model_copy(update={"max_bucket_reso": bound}), images)
    return (share, bound, better) if better - share >= MIN_GAIN else None


def better_step(config: DatasetConfig, images: Iterable[tuple[Size, int]]) -> tuple[float, int, float] | None:
    """A better bucket_reso_steps for a dataset whose images bucket_no_upscale rounds far down.

    images: (size, number of uses). Returns the share of the area that images could have, their own or that of `resolution`, half
    the step, and the share with it; None if the gain is small.
    """
    if not (config.enable_bucket and config.bucket_no_upscale) or config.bucket_reso_steps % 64:
        return None
    finer = config.model_copy(update={"bucket_reso_steps": config.bucket_reso_steps // 2})
    rule, finer_rule, largest = BucketRule(config), BucketRule(finer), math.prod(config.resolution)
    possible, area, better = 0, 0, 0
    for size, count in images:
        possible += min(math.prod(size), largest) * count
        area += math.prod(rule.assign(*size).bucket) * count
        better += math.prod(finer_rule.assign(*size).bucket) * count
    if not possible or area >= (1 - MIN_GAIN) * possible or better - area < MIN_GAIN / 2 * possible:
        return None
    return area / possible, finer.bucket_reso_steps, better / possible


def _share_of_area(config: DatasetConfig, images: Iterable[tuple[Size, int]]) -> float:
    """The area of the images' buckets as a share of the area of `resolution`, averaged over the uses of the images."""
    rule, area, uses = BucketRule(config), 0, 0
    for size, count in images:
        area += math.prod(rule.assign(*size).bucket) * count
        uses += count
    return area / (uses * math.prod(config.resolution)) if uses else 1.0
