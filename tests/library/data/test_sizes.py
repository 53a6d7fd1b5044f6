"""Batch.sizes: original size, what was really cut off, and the result, read off images whose colours are their coordinates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.data.pixels import ImageCrop
from library.models.family import LatentSpace

# Bucket, image, then the size after resizing to cover it and what is cut at left and top: all (width, height), (left, top).
EXAMPLES = [
    ((832, 1216), (1000, 1500), (832, 1248), (0, 16)),
    ((1024, 1024), (1000, 1500), (1024, 1536), (0, 256)),
    ((832, 1216), (2000, 2000), (1216, 1216), (192, 0)),
    ((1216, 832), (1920, 1080), (1479, 832), (131, 0)),
    ((896, 1152), (3000, 4000), (896, 1195), (0, 21)),
]


def coordinates(path, width: int, height: int) -> None:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    Image.fromarray(np.stack([columns, rows, rows * 0], axis=2).astype(np.uint8)).save(path)


def dataset(folder, **keys) -> TrainingDataset:
    subset = SubsetConfig(image_dir=folder, class_tokens="dog", **keys)
    return TrainingDataset([DatasetConfig(resolution=(64, 64), batch_size=1, subsets=(subset,))], seed=3)


@pytest.mark.parametrize("bucket, image, resized, corner", EXAMPLES)
def test_trap_25_26_28_29_a_cut_in_the_middle_and_its_mirror_image(bucket, image, resized, corner, tmp_path):
    Image.new("L", image).save(tmp_path / "a.png")
    made = TrainingDataset(
        [DatasetConfig(resolution=bucket, batch_size=1, subsets=(SubsetConfig(image_dir=tmp_path, class_tokens="dog"),))], seed=1
    )
    (left, top), (width, height) = corner, bucket
    assert made[(1, 0)].sizes.tolist() == [[image[1], image[0], top, left, height, width]]
    crop = ImageCrop(tmp_path, image, resized, corner, bucket, None)
    assert crop.sizes(mirrored=True)[2:4] == (top, resized[0] - width - left)


@pytest.mark.parametrize("name", ["a.png", "a_60_30_40_40.png"])  # the second with a face
def test_trap_27_random_and_face_crops_mirrored_too(tmp_path, name):
    coordinates(tmp_path / name, 100, 64)
    face = {"face_crop_aug_range": (1.0, 3.0)} if "_" in name else {}
    made = dataset(tmp_path, random_crop=True, flip_aug=True, **face)
    corners = set()
    for epoch in range(1, 41):
        batch = made[(epoch, 0)]
        pixels = np.rint((batch.images[0].numpy() + 1) * 127.5)
        original, (top, left), size = batch.sizes[0].split(2)
        assert original.tolist() == [64, 100] and size.tolist() == [64, 64]
        mirrored = pixels[0, 0, 0] > pixels[0, 0, -1]
        first = pixels[0, 0].min()
        assert int(top) == pixels[1, 0, 0] and int(left) == (36 - first if mirrored else first)
        corners.add((bool(mirrored), int(left)))
    assert len(corners) > 10 and {mirrored for mirrored, _ in corners} == {False, True}


def test_trap_28_cached_latents_come_with_the_sizes_that_images_have(tmp_path):
    coordinates(tmp_path / "a.png", 100, 64)
    made = dataset(tmp_path, flip_aug=True)
    uncached = {tuple(made[(epoch, 0)].sizes[0].tolist()) for epoch in range(1, 20)}
    made.cache_latents(lambda images, seeds: images[:, :, ::8, ::8], batch_size=1, to_disk=False, fingerprint="v")
    assert {tuple(made[(epoch, 0)].sizes[0].tolist()) for epoch in range(1, 20)} == {(64, 100, 0, 18, 64, 64)} == uncached


def test_latents_of_another_space_have_their_own_number_of_positions(tmp_path):
    coordinates(tmp_path / "a.png", 64, 64)
    Image.new("L", (64, 64), 128).save(tmp_path / "mask.png")
    space = replace(LatentSpace(), pixels_per_latent=16)
    subset = SubsetConfig(image_dir=tmp_path, class_tokens="dog", alpha_mask=True)
    image = Image.new("RGBA", (64, 64), (9, 9, 9, 100))
    image.save(tmp_path / "a.png")
    made = TrainingDataset([DatasetConfig(resolution=(64, 64), batch_size=2, subsets=(subset,))], seed=3, latent_space=space)
    assert made[(1, 0)].masks.shape == (2, 1, 4, 4)
    assert torch.equal(LatentSpace(scale=0.5, shift=1.0).scaled(torch.tensor([3.0])), torch.tensor([1.0]))
    assert torch.equal(LatentSpace(scale=0.5, shift=1.0).unscaled(torch.tensor([1.0])), torch.tensor([3.0]))
