"""Loss masks go along with their images: resized, cut, turned and mirrored alike, with and without cached latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.config import datasets_from_file, datasets_from_folders
from library.data.config_keys import DatasetDefaults
from library.data.dataset import TrainingDataset
from library.data.debug import describe_batch
from library.data.loader import make_loader
from library.data.masks import check_masks, latent_mask
from library.errors import UserError
from library.models.family import LatentSpace


def half(width: int, height: int) -> np.ndarray:
    """White on the left half, with a grey row on top."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[:, : width // 2] = 255
    values[: height // 8] = 128
    return values


@pytest.fixture
def data(tmp_path) -> Path:
    """Images whose red channel is their mask, so that both must stay together, and masks apart: one of half the size."""
    (tmp_path / "images" / "2_cat").mkdir(parents=True)
    (tmp_path / "masks" / "2_cat").mkdir(parents=True)
    for name, (width, height), scale in (("a", (64, 64), 1), ("b", (96, 64), 2), ("c", (64, 160), 1)):
        mask = half(width, height)
        rgb = np.stack([mask, np.zeros_like(mask), np.full_like(mask, 9)], axis=2)
        Image.fromarray(rgb).save(tmp_path / "images" / "2_cat" / f"{name}.png")
        Image.fromarray(half(width // scale, height // scale)).save(tmp_path / "masks" / "2_cat" / f"{name}.webp", lossless=True)
    return tmp_path


def dataset(data: Path, masks: bool = True, **defaults) -> TrainingDataset:
    chosen = DatasetDefaults(resolution=64, batch_size=6, **defaults)
    return TrainingDataset(datasets_from_folders(data / "images", None, chosen, data / "masks" if masks else None), seed=3)


def red_at_latent_size(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d((images[:, :1] + 1) / 2, 8)


@pytest.mark.parametrize(
    "options", [{}, {"flip_aug": True}, {"random_crop": True}, {"enable_bucket": True, "min_bucket_reso": 64, "flip_aug": True}]
)
def test_masks_stay_on_their_images(data, options):
    made, seen = dataset(data, **options), []
    for epoch in (1, 2):
        for position in range(made.num_batches):
            batch = made[(epoch, position)]
            assert batch.masks.shape == (len(batch.paths), 1, batch.size[1] // 8, batch.size[0] // 8)
            torch.testing.assert_close(batch.masks, red_at_latent_size(batch.images), atol=0.06, rtol=0)
            seen += [mask[0, -1].tolist() for mask in batch.masks]
    if "flip_aug" in options:
        assert any(row[0] > 0.9 > 0.1 > row[-1] for row in seen) and any(row[-1] > 0.9 > 0.1 > row[0] for row in seen)


def encode(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(torch.cat([images, images[:, :1]], dim=1), 8)


@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_cached_latents_keep_their_masks(data, to_disk):
    plain, cached = dataset(data, flip_aug=True), dataset(data, flip_aug=True)
    cached.cache_latents(encode, batch_size=2, to_disk=to_disk, fingerprint="v")
    for position in range(plain.num_batches):
        assert torch.equal(cached[(1, position)].masks, plain[(1, position)].masks)
        torch.testing.assert_close(cached[(1, position)].latents, encode(plain[(1, position)].images, []))


def test_a_changed_mask_is_not_read_from_an_old_cache(data):
    def masks() -> torch.Tensor:
        made = dataset(data)
        made.cache_latents(encode, batch_size=2, to_disk=True, fingerprint="v")
        return made[(1, 0)].masks

    first = masks()
    assert torch.equal(first, masks())
    for path in (data / "masks" / "2_cat").iterdir():
        Image.new("L", Image.open(path).size, 255).save(path, lossless=True)
    assert (masks() == 1).all() and not (first == 1).all()


@pytest.mark.parametrize("cached", [False, True])
def test_alpha_channel_as_mask(data, cached):
    folder = data / "images" / "2_cat"
    alpha = Image.fromarray(half(64, 64))
    image = Image.new("RGB", (64, 64), "blue")
    image.putalpha(alpha)
    for path in folder.iterdir():
        path.unlink()
    image.save(folder / "see-through.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # stands upright after a quarter turn clockwise
    turned.save(folder / "turned.png", exif=exif)
    Image.new("RGB", (64, 64), "blue").save(folder / "whole.png")
    made = dataset(data, masks=False, alpha_mask=True)
    if cached:
        made.cache_latents(encode, batch_size=3, to_disk=True, fingerprint="v")
    batch = made[(1, 0)]
    by_name = {Path(path).stem: mask for path, mask in zip(batch.paths, batch.masks, strict=True)}
    wanted = latent_mask(half(64, 64), LatentSpace())
    assert torch.equal(by_name["see-through"], wanted) and torch.equal(by_name["turned"], wanted)
    assert (by_name["whole"] == 1).all()
    assert dataset(data, masks=False)[(1, 0)].masks is None


def test_latent_mask_averages_areas():
    values = np.zeros((16, 24), dtype=np.uint8)
    values[:8, :4] = 255
    values[8:, 16:] = 51
    np.testing.assert_allclose(latent_mask(values, LatentSpace())[0], [[0.5, 0, 0], [0, 0, 0.2]], atol=1e-6)


def test_masks_in_a_dataset_file_and_for_some_subsets_only(data):
    config = data / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 6\n[[datasets.subsets]]\nimage_dir = 'images/2_cat'\n"
        "conditioning_data_dir = 'masks/2_cat'\n[[datasets.subsets]]\nimage_dir = 'masks/2_cat'\nis_reg = true\n",
        encoding="utf-8",
    )
    made = TrainingDataset(datasets_from_file(config, DatasetDefaults()), seed=1)
    batch = made[(1, 0)]
    for path, mask in zip(batch.paths, batch.masks, strict=True):
        assert (mask == 1).all() == (Path(path).suffix == ".webp")
    assert "of the image counts" in describe_batch(batch, made)


def test_what_is_wrong_with_masks_is_named(data):
    defaults = DatasetDefaults(resolution=64)
    with_masks = datasets_from_folders(data / "images", None, defaults, data / "masks")
    without = datasets_from_folders(data / "images", None, defaults)
    check_masks(with_masks, True)
    check_masks(without, False)
    check_masks(datasets_from_folders(data / "images", None, DatasetDefaults(resolution=64, alpha_mask=True)), False)
    with pytest.raises(UserError, match="--masked_loss, which is not given; ControlNets are not trained here"):
        check_masks(with_masks, False)
    with pytest.raises(UserError, match="no subset has masks"):
        check_masks(without, True)
    both = datasets_from_folders(data / "images", None, DatasetDefaults(resolution=64, alpha_mask=True), data / "masks")
    with pytest.raises(UserError, match="from one of them"):
        check_masks(both, True)
    with pytest.raises(UserError, match="there is no folder"):
        datasets_from_folders(data / "images", None, defaults, data)
    Image.new("L", (64, 32)).save(data / "masks" / "2_cat" / "a.webp")
    with pytest.raises(UserError, match="their shapes differ"):
        dataset(data)
    (data / "masks" / "2_cat" / "a.webp").unlink()
    with pytest.raises(UserError, match=r"holds no mask for 1 image \(a.png\)"):
        dataset(data)


def test_of_two_masks_of_one_image_the_one_in_use_is_named(data, caplog):
    folder = data / "masks" / "2_cat"
    Image.fromarray(half(64, 64)).save(folder / "a.png")
    assert [path.name for path in dataset(data).table.masks] == ["a.webp", "b.webp", "c.webp"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} holds several masks for 1 image, and the last is used: a.png: a.png, a.webp"
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_whose_mask_is_black_is_named_once(data, caplog, cached):
    mask = data / "masks" / "2_cat" / "a.webp"
    Image.new("L", Image.open(mask).size, 0).save(mask, lossless=True)
    made = dataset(data)
    if cached:
        made.cache_latents(encode, batch_size=2, to_disk=True, fingerprint="v")
    loader = make_loader(made)
    assert all(len(list(loader.epoch(epoch))) == made.num_batches for epoch in (1, 2))
    assert [record.getMessage() for record in caplog.records] == [
        f"{data / 'images' / '2_cat' / 'a.png'}: its mask is black where the image is used, so nothing of it is learned"
    ]


def test_the_erased_part_of_a_mask_does_not_count(data):
    folder = data / "masks" / "2_cat"
    (folder / "a.webp").unlink()
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    mask.save(folder / "a.png")
    made = dataset(data)
    lines = describe_batch(made[(1, 0)], made).splitlines()
    shown = [lines[index + 2] for index, line in enumerate(lines) if "a.png" in line]
    assert shown == ["    mask: 50% of the image counts"] * 2
