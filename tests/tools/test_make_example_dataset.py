"""The example images: what the tool writes, and that the shipped ones are what their dataset files say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.data.dataset import TrainingDataset
from library.errors import UserError
from tools import make_example_dataset

ASSETS = Path(__file__).parents[2] / "assets"


def test_bucket_example_has_many_shapes_and_a_caption_each():
    dataset = TrainingDataset(datasets_from_file(ASSETS / "example-buckets" / "dataset.toml", DatasetDefaults()), seed=0)
    sizes = {dataset.table.bucket_size(row) for row in range(len(dataset.table))}
    assert len(dataset.table) == len(make_example_dataset.MIXED_SHAPES) == 8
    assert len(sizes) >= 5 and (256, 256) in sizes
    assert any(width > height for width, height in sizes) and any(height > width for width, height in sizes)
    assert all(width * height <= 256 * 256 and min(width, height) >= 128 for width, height in sizes)
    assert set(dataset.table.captions) == {caption for _, caption in make_example_dataset.MIXED_SHAPES.values()}


def test_bucket_images_are_credited():
    credits = (ASSETS / "example-buckets" / "CREDITS.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in credits for name in make_example_dataset.MIXED_SHAPES)


def test_bucket_images_are_made_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(make_example_dataset, "MIXED_SHAPES", {"sea": ("met-1", "the sea")})
    (tmp_path / "package" / "images").mkdir(parents=True)
    Image.new("RGB", (1000, 500), "blue").save(tmp_path / "package" / "images" / "met-1.webp")
    make_example_dataset.write_bucket_images(tmp_path / "package", tmp_path / "images")
    with Image.open(tmp_path / "images" / "sea.webp") as image:
        assert image.size == (384, 192)
    assert (tmp_path / "images" / "sea.txt").read_text(encoding="utf-8") == "the sea\n"


@pytest.mark.parametrize("options", [[], ["--emoji", "nowhere"], ["--wallpapers", "nowhere"]])
def test_wrong_folders_are_one_line(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["make_example_dataset.py", *options])
    with pytest.raises(UserError, match="give"):
        make_example_dataset.main()
