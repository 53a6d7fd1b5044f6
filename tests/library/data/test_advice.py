"""What is allowed and costs quality is said before training, with the better value."""

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
    assert line.startswith("2 images are enlarged to more than 1.5 times") and "1.png from 300x300 to 1024x1024" in line
    assert not lines(tmp_path / "b", [(300, 300)], bucket_no_upscale=True)


@pytest.mark.parametrize("resolution", [512, 768])
def test_ordinary_data_needs_no_advice(tmp_path, resolution):
    assert not lines(tmp_path / "a", [(1000, 1500), (1024, 768), (900, 900)], resolution=resolution)
