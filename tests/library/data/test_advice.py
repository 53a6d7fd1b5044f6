"""Advice before training on what is allowed but costs quality, with the better value."""

from __future__ import annotations

import pytest
from PIL import Image

from library.data.advice import advice
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.table import build_table


def lines(folder, sizes, **keys) -> list[str]:
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("L", size).save(folder / f"{number}.png")
    subset = SubsetConfig(image_dir=folder, class_tokens="dog")
    return list(advice(build_table([DatasetConfig(**{"resolution": 1024, "enable_bucket": True, "subsets": (subset,), **keys})])))


def test_trap_31_the_option_that_shrinks_images_is_named_with_a_better_value(tmp_path):
    (line,) = lines(tmp_path / "a", [(1000, 1500), (1500, 1000)])
    assert line.startswith("dataset 1: images get 69% of the area of resolution 1024x1024 on average")
    assert line.endswith("max_bucket_reso 1024; --max_bucket_reso=2048 makes that 96%")
    assert not lines(tmp_path / "b", [(1000, 1500)], max_bucket_reso=2048)


def test_trap_30_small_images_that_are_enlarged_are_named(tmp_path):
    (line,) = lines(tmp_path / "a", [(600, 600), (300, 300), (900, 900)])
    assert line.startswith("2 images would be enlarged to more than 1.5 times") and "1.png from 300x300 to 1024x1024" in line
    assert not lines(tmp_path / "b", [(320, 320)], bucket_no_upscale=True)


def test_trap_32_steps_that_cut_much_away_are_named_with_a_finer_one(tmp_path):
    """bucket_no_upscale rounds down and never up, as its name says: a nearly square image becomes 960 x 960."""
    (line,) = lines(tmp_path / "a", [(1100, 1090)], bucket_no_upscale=True)
    assert line.startswith("dataset 1: bucket_no_upscale leaves 88% of the area")
    assert line.endswith("multiples of bucket_reso_steps 64; --bucket_reso_steps=32 makes that 94%")
    assert not lines(tmp_path / "b", [(1100, 1090)], bucket_no_upscale=True, bucket_reso_steps=32)
    assert not lines(tmp_path / "c", [(1100, 1090)], max_bucket_reso=2048)  # the nearest bucket: 1024 x 1024


def test_trap_32_batches_that_buckets_leave_short_are_counted(tmp_path):
    sizes = [(1024, 1024), (832, 1216), (1216, 832), (896, 1152)]
    usual = {"max_bucket_reso": 2048, "min_bucket_reso": 512}
    (line,) = lines(tmp_path / "a", sizes, batch_size=4, **usual)
    assert line == (
        "dataset 1: 4 of 4 batches hold fewer than 4 images, since images of 4 training sizes never share one; "
        "num_repeats 4 with fewer epochs fills them"
    )
    assert not lines(tmp_path / "b", sizes, batch_size=1, **usual)
    assert not lines(tmp_path / "c", sizes[:1] * 5, batch_size=4, **usual)  # no bucket's fault


@pytest.mark.parametrize("resolution", [512, 768])
def test_ordinary_data_needs_no_advice(tmp_path, resolution):
    assert not lines(tmp_path / "a", [(1000, 1500), (1024, 768), (900, 900)], resolution=resolution)
