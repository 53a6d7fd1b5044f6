"""Long curves made short enough for a page without hiding what they show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_BINS = 900  # about the pixels of a chart


def running_mean(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each index from the `width`-th on: (n,) -> (n - width + 1,) float64."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    return (sums[width:] - sums[:-width]) / width


def extremes(steps: np.ndarray, values: np.ndarray, bins: int = MOST_BINS) -> tuple[list[int], list[float]]:
    """The lowest and the highest point of each of `bins` equal parts, in their order: every spike stays.

    steps, values: (n,). With at most 2 * bins points all of them.
    """
    if len(values) <= 2 * bins:
        return steps.tolist(), rounded(values)
    kept = []
    for part in np.array_split(np.arange(len(values)), bins):
        kept += sorted({int(part[0] + values[part].argmin()), int(part[0] + values[part].argmax())})
    return steps[kept].tolist(), rounded(values[kept])


def evenly(
    steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray, points: int = MOST_BINS
) -> tuple[list[int], list[float]]:
    """At most `points` points of a smooth curve, evenly spread, the first and the last among them."""
    xs, ys = np.asarray(steps), np.asarray(values)
    if len(ys) > points:
        kept = np.linspace(0, len(ys) - 1, points).round().astype(int)
        xs, ys = xs[kept], ys[kept]
    return xs.tolist(), rounded(ys)


def rounded(values: np.ndarray) -> list[float]:
    """Five digits, which is more than a chart shows."""
    return [float(f"{value:.5g}") for value in values.tolist()]
