"""The bucket rule, row by row against what the common implementation does, and on sizes at which it crashes."""

from __future__ import annotations

import csv
import io
import random
import re
from pathlib import Path

import pytest

from library.data.buckets import (
    BucketAssignment,
    BucketRule,
    better_bound,
    bucket_info,
    bucket_list,
    bucket_table,
    count_buckets,
    wrong_sides,
)
from library.data.config_keys import DatasetConfig, SubsetConfig

DATA = Path(__file__).parents[2] / "data"
SUBSET = SubsetConfig(image_dir="images")


def rows(name: str) -> list[dict[str, str]]:
    with open(DATA / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rule(resolution=512, no_upscale=False, **keys) -> BucketRule:
    config = {"enable_bucket": True, "bucket_no_upscale": no_upscale, **keys}
    return BucketRule(DatasetConfig(resolution=resolution, subsets=(SUBSET,), **config))


def numbers(row: dict[str, str], *keys: str) -> tuple[int, ...]:
    return tuple(int(row[key]) for key in keys)


def name_of(row: dict[str, str]) -> str:
    mode = "no_upscale" if row["bucket_no_upscale"] == "yes" else "normal"
    return f"{row['resolution']}-{mode}-{row['image_w']}x{row['image_h']}"


EXAMPLES = rows("bucketing-examples.csv")


@pytest.mark.parametrize("row", [r for r in EXAMPLES if r["status"] == "ok"], ids=name_of)
def test_examples(row):
    assignment = rule(int(row["resolution"]), row["bucket_no_upscale"] == "yes").assign(*numbers(row, "image_w", "image_h"))
    assert assignment.bucket == numbers(row, "bucket_w", "bucket_h")
    assert assignment.resized == numbers(row, "resized_w", "resized_h")
    assert assignment.corner == numbers(row, "crop_left", "crop_top")
    assert tuple(r - b for r, b in zip(assignment.resized, assignment.bucket, strict=True)) == numbers(row, "trim_w", "trim_h")
    assert assignment.ar_error == pytest.approx(float(row["ar_error"]), abs=1e-6)
    assert assignment.fits


@pytest.mark.parametrize("row", [r for r in EXAMPLES if r["status"] != "ok"], ids=name_of)
def test_trap_4_13_examples_that_crash_are_enlarged_to_one_step(row):
    assignment = rule(int(row["resolution"]), True).assign(*numbers(row, "image_w", "image_h"))
    assert (assignment.bucket, assignment.resized, assignment.corner, assignment.fits) == ((64, 64), (64, 64), (0, 0), False)


def test_no_example_is_missing():
    assert len(EXAMPLES) == 240 and sum(r["status"] != "ok" for r in EXAMPLES) == 2


LISTS = [r for r in rows("bucketing-resolution-lists.csv") if r["version"] in ("head", "both")]


@pytest.mark.parametrize(
    "row", LISTS, ids=lambda r: "-".join([r["max_reso"], r["min_bucket_reso"], r["max_bucket_reso"], r["bucket_reso_steps"]])
)
def test_trap_4_14_bucket_lists_are_filtered(row):
    resolution = tuple(map(int, row["max_reso"].split("x")))
    low, high, step = numbers(row, "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    expected = [tuple(map(int, size.split("x"))) for size in row["resolutions"].split()]
    found = bucket_list(resolution, low, high, step)
    assert found == expected and len(found) == int(row["count"])
    assert all(low <= min(size) and max(size) <= high for size in found if size[0] != size[1])


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5000), (5000, 1), (63, 4000), (60000, 10), (30, 30), (65535, 7), (1, 262145), (7, 7)]
)
def test_trap_4_13_no_size_crashes(size, no_upscale):
    assignment = rule(512, no_upscale).assign(*size)
    check(assignment, size, 64, 512 * 512)
    assert assignment.fits == (not no_upscale and max(size) < 100), "thin ones are reported"


def test_a_strip_keeps_the_area_of_the_training_size():
    assert rule(512, True).assign(1, 5000) == BucketAssignment((64, 4096), (64, 320000), (0, 157952), 64 / 4096 - 1 / 5000, False)


def check(assignment: BucketAssignment, size: tuple[int, int], step: int, area: int) -> None:
    bucket, resized, corner = assignment.bucket, assignment.resized, assignment.corner
    assert all(side >= step and side % step == 0 for side in bucket)
    assert all(r >= b for r, b in zip(resized, bucket, strict=True)), "the image covers the bucket"
    assert corner == tuple((r - b) // 2 for r, b in zip(resized, bucket, strict=True))
    # bucket_no_upscale rounds sides to whole pixels before it rounds down to the step: under a pixel of the shorter side.
    assert bucket[0] * bucket[1] <= area * (1 + 1 / min(bucket))
    # One side at least is scaled exactly; the other one differs by rounding alone.
    scale = max(r / s for r, s in zip(resized, size, strict=True))
    assert all(abs(r - s * scale) <= 0.5 + s / max(min(size), 1) for r, s in zip(resized, size, strict=True))


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize(("resolution", "step"), [((512, 512), 64), ((640, 448), 64), ((500, 500), 8), ((768, 512), 32)])
def test_random_sizes_are_covered_and_keep_the_area(resolution, step, no_upscale):
    draw = random.Random(1)
    buckets = rule(resolution, no_upscale, bucket_reso_steps=step, min_bucket_reso=256, max_bucket_reso=1024)
    for _ in range(2000):
        size = tuple(int(2 ** draw.uniform(0, 14)) for _ in range(2))
        assignment = buckets.assign(*size)
        check(assignment, size, step, resolution[0] * resolution[1])
        if no_upscale and min(size) >= step and size[0] * size[1] <= resolution[0] * resolution[1]:
            assert assignment.resized == size, "nothing is enlarged"
        if not no_upscale:
            assert assignment.bucket in buckets.buckets


def test_without_buckets_everything_becomes_the_resolution():
    off = rule((640, 448), enable_bucket=False, no_upscale=True)
    assert off.assign(640, 448) == BucketAssignment((640, 448), (640, 448), (0, 0), 0.0, True)
    assert off.assign(1000, 1000) == BucketAssignment((640, 448), (640, 640), (0, 96), 640 / 448 - 1, True)
    assert off.assign(100, 50).resized == (896, 448)


def test_bounds_below_the_step_do_not_divide_by_zero():
    assert all(min(size) >= 64 for size in rule(512, min_bucket_reso=8).buckets)


def test_table_and_metadata_count_images_and_repeats():
    counts = count_buckets([((512, 512), 10), ((384, 640), 1), ((512, 512), 1)])
    assert bucket_info(counts, [0.5, -0.25, 0.0]) == {
        "buckets": {"0": {"resolution": [384, 640], "count": 1}, "1": {"resolution": [512, 512], "count": 11}},
        "mean_img_ar_error": 0.25,
    }
    from rich.console import Console

    screen = io.StringIO()
    Console(file=screen, width=80).print(bucket_table(counts, "dataset 1"))
    text = screen.getvalue()
    assert "dataset 1" in text and "512 x 512" in text and "with repeats" in text
    assert [line.split()[-2] for line in text.splitlines() if "all" in line] == ["12"]


# ---------------------------------------------------------------- sides that a model needs, and bounds that shrink


def bucketed(**keys) -> DatasetConfig:
    return DatasetConfig(**{"resolution": 1024, "enable_bucket": True, "subsets": (SUBSET,), **keys})


@pytest.mark.parametrize(
    "low, high, step, count, least, mean",
    [
        (256, 1024, 64, 25, 0.25, 0.61),
        (256, 2048, 64, 41, 0.50, 0.91),
        (512, 2048, 64, 33, 0.91, 0.96),
        (512, 2048, 32, 65, 0.95, 0.98),
    ],
)
def test_trap_31_the_buckets_of_1024_by_bounds(low, high, step, count, least, mean):
    shares = [width * height / 1024**2 for width, height in bucket_list((1024, 1024), low, high, step)]
    assert len(shares) == count
    assert (min(shares), sum(shares) / count) == pytest.approx((least, mean), abs=0.006)


def test_trap_31_bounds_that_shrink_images_are_reported_with_a_better_one():
    portraits = [((1000, 1500), 3)]
    share, bound, better = better_bound(bucketed(), portraits)
    assert (bound, share, better) == (2048, pytest.approx(704 * 1024 / 1024**2), pytest.approx(832 * 1216 / 1024**2))
    mixed = better_bound(bucketed(), [*portraits, ((1024, 1024), 1)])
    assert mixed is not None and mixed[0] == pytest.approx((3 * 704 * 1024 + 1024**2) / 4 / 1024**2)
    assert better_bound(bucketed(), [((1024, 1024), 5)]) is None  # square images lose nothing
    assert better_bound(bucketed(max_bucket_reso=2048), portraits) is None
    assert better_bound(bucketed(resolution=512), portraits) is None  # the usual bounds fit SD 1
    assert better_bound(bucketed(bucket_no_upscale=True), portraits) is None  # then the bounds choose nothing
    assert better_bound(bucketed(enable_bucket=False), portraits) is None


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"bucket_reso_steps": 32}, None),
        ({"bucket_reso_steps": 96, "max_bucket_reso": 1152}, None),
        ({"bucket_reso_steps": 48, "max_bucket_reso": 1152}, "bucket_reso_steps is 48, and sides for SDXL .* 32; make it 32"),
        ({"enable_bucket": False, "resolution": (1024, 800)}, None),
        ({"enable_bucket": False, "resolution": (1000, 500)}, "resolution is 1000x500, and .*; make it 992x512"),
    ],
)  # fmt: skip
def test_sides_are_multiples_of_what_the_model_needs(keys, part):
    wrong = wrong_sides(bucketed(**keys), 32, "SDXL")
    assert wrong is None if part is None else re.match(part, wrong)
    assert wrong_sides(bucketed(**keys), 1, "SD 1.x") is None
