"""Latents computed once: the right ones, never stale ones, and not again after an interruption."""

from __future__ import annotations

import logging
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache import FOLDER, cache_path
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.data.loader import make_loader
from library.errors import UserError

SIZES = [(64, 64), (96, 48), (64, 64), (48, 96)]


class FakeVae:
    """Latents that show image, seed and side: 8 x 8 means, and the seed in channel 3. Counts what it is asked for."""

    def __init__(self, stop_after=None):
        self.batches, self.seeds, self.stop_after = [], [], stop_after

    def __call__(self, images, seeds):
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1 and len(seeds) == len(images)
        self.batches.append(tuple(images.shape))
        self.seeds += seeds
        latents = torch.nn.functional.avg_pool2d(images, 8)
        mark = torch.tensor([seed % 9973 for seed in seeds], dtype=torch.float32)
        return torch.cat([latents, mark[:, None, None, None].expand(-1, 1, *latents.shape[2:])], dim=1)

    @property
    def images(self):
        return sum(shape[0] for shape in self.batches)


def make_folder(folder, count=8):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def make_dataset(folder, resolution=64, flip=False, **keys):
    subset = SubsetConfig(image_dir=folder, class_tokens="dog", flip_aug=flip, **keys)
    config = DatasetConfig(
        resolution=resolution,
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=16,
        batch_size=2,
        subsets=(subset,),
    )
    return TrainingDataset([config], seed=1)


def cache(dataset, vae=None, to_disk=True, fingerprint="vae 1", batch_size=3):
    vae = vae or FakeVae()
    dataset.cache_latents(vae, batch_size=batch_size, to_disk=to_disk, fingerprint=fingerprint, workers=2)
    return vae


def epoch(dataset, number=1):
    return [dataset[(number, position)] for position in range(len(dataset))]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images with space")


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_are_those_of_the_images_served_without_a_cache(folder, to_disk, flip):
    plain, dataset = make_dataset(folder, flip=flip), make_dataset(folder, flip=flip)
    vae = cache(dataset, to_disk=to_disk)
    assert vae.images == (16 if flip else 8)
    for number in (1, 2, 3):
        for a, b in zip(epoch(dataset, number), epoch(plain, number), strict=True):
            assert a.images is None and a.paths == b.paths and a.captions == b.captions
            assert a.latents.dtype == torch.float32 and a.latents.shape[1:] == (4, b.size[1] // 8, b.size[0] // 8)
            assert torch.allclose(a.latents[:, :3], torch.nn.functional.avg_pool2d(b.images, 8), atol=1e-6)
    if flip:
        batches = [batch for number in range(1, 9) for batch in epoch(dataset, number)]
        served = {
            (path, float(latent[3, 0, 0])) for batch in batches for path, latent in zip(batch.paths, batch.latents, strict=True)
        }
        assert len(served) == 16  # each side has noise of its own


def test_latents_are_encoded_in_batches_of_one_bucket(folder):
    vae = cache(make_dataset(folder), batch_size=3)
    assert sorted(vae.batches) == [(1, 3, 64, 64), (2, 3, 48, 80), (2, 3, 80, 48), (3, 3, 64, 64)]


def test_seeds_come_from_the_image_not_from_its_batch(folder, tmp_path):
    one, three = FakeVae(), FakeVae()
    cache(make_dataset(folder), one, to_disk=False, batch_size=1)
    cache(make_dataset(folder), three, to_disk=False, batch_size=3)
    assert one.seeds == three.seeds and len(set(one.seeds)) == 8
    # A copy elsewhere, under other names, has the same noise.
    for path in folder.glob("*.png"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "copy" / f"x{path.name}")
    copy = FakeVae()
    cache(make_dataset(tmp_path / "copy"), copy, to_disk=False)
    assert copy.seeds == one.seeds


def test_the_second_run_encodes_nothing(folder):
    first = make_dataset(folder, flip=True)
    cache(first)
    second = make_dataset(folder, flip=True)
    assert cache(second).batches == []
    for a, b in zip(epoch(first), epoch(second), strict=True):
        assert torch.equal(a.latents, b.latents)
    assert len(second.table) == 8  # files in the cache folder are not taken for images


def test_trap_4_8_another_resolution_or_cut_is_encoded_anew(folder):
    cache(make_dataset(folder))
    assert cache(make_dataset(folder, resolution=48)).images == 8
    assert cache(make_dataset(folder, resolution=48, resize_interpolation="nearest")).images == 8
    assert cache(make_dataset(folder, flip=True)).images == 16
    assert cache(make_dataset(folder)).images == 0  # the old ones are still good
    for batch in epoch(make_dataset(folder, resolution=48)):
        assert batch.images.shape[2:] == batch.size[::-1]


def test_trap_4_9_and_23_another_vae_or_a_changed_image_is_encoded_anew(folder):
    cache(make_dataset(folder))
    assert cache(make_dataset(folder), fingerprint="vae 2").images == 8
    before = os.stat(folder / "000.png")
    pixels = np.asarray(Image.open(folder / "000.png")).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(folder / "000.png")
    os.utime(folder / "000.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # even if the time of change was kept
    dataset = make_dataset(folder)
    vae = cache(dataset)
    assert vae.images == 1
    for batch in epoch(dataset):
        for path, latent in zip(batch.paths, batch.latents, strict=True):
            if path.endswith("000.png"):
                expected = torch.from_numpy(pixels[:8, :8].astype(np.float32) / 127.5 - 1).mean(dim=(0, 1))
                assert torch.allclose(latent[:3, 0, 0], expected, atol=1e-5)


def test_interrupted_caching_continues(folder):
    dataset = make_dataset(folder)
    broken = FakeVae(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        cache(dataset, broken, batch_size=2)
    assert dataset.latents is None
    rest = cache(dataset, batch_size=2)
    assert rest.images == 8 - broken.images == 4
    assert not [path for path in (folder / FOLDER).iterdir() if path.name.startswith(".")]  # no half-written file is left


@pytest.mark.parametrize("damage", [lambda c: c[:-7], lambda c: b"", lambda c: b"\xff" * len(c), lambda c: c + b"x"])
def test_damaged_files_are_made_again(folder, caplog, damage):
    cache(make_dataset(folder))
    path = sorted((folder / FOLDER).iterdir())[3]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert cache(make_dataset(folder)).images == 1
    assert path.name in caplog.text and path.read_bytes() == whole


def test_a_file_that_vanishes_during_training_is_named(folder):
    dataset = make_dataset(folder)
    cache(dataset)
    shutil.rmtree(folder / FOLDER)
    with pytest.raises(UserError, match="start again"):
        dataset[(1, 0)]


@pytest.mark.parametrize("option, value", [("color_aug", True), ("random_crop", True), ("face_crop_aug_range", (1.0, 2.0))])
def test_augmentations_that_change_images_are_refused(folder, option, value):
    subset = SubsetConfig(image_dir=folder, **{option: value})
    dataset = TrainingDataset([DatasetConfig(resolution=64, subsets=(subset,))], seed=1)
    with pytest.raises(UserError, match=f"(?s){option}.*{folder.name}"):
        cache(dataset, to_disk=False)


def test_a_folder_that_cannot_be_written_is_named_with_the_cure(folder):
    (folder / FOLDER).write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write to .*--cache_latents instead"):
        cache(make_dataset(folder))


def test_trap_24_latents_that_are_not_finite_name_the_image_and_are_not_kept(folder):
    def broken(images, seeds):
        latents = torch.zeros(len(images), 4, images.shape[2] // 8, images.shape[3] // 8)
        latents[-1, 2, 0, 0] = float("nan")
        return latents

    with pytest.raises(UserError, match=r"\d\d\d\.png.*--no_half_vae"):
        cache(make_dataset(folder), broken)
    assert not list((folder / FOLDER).glob("*")) if (folder / FOLDER).exists() else True


def test_an_image_cut_off_is_named_while_caching(folder):
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:3000])
    with pytest.raises(UserError, match="003.png: cut off or damaged"):
        cache(make_dataset(folder))


def test_long_and_foreign_names_fit_the_file_system(tmp_path):
    folder = tmp_path / "写真"
    folder.mkdir()
    for name in ("字" * 80 + "a.png", "字" * 80 + "b.png"):
        Image.new("RGB", (64, 64), (ord(name[-5]), 0, 0)).save(folder / name)
    dataset = make_dataset(folder)
    assert cache(dataset).images == 2 and cache(make_dataset(folder)).images == 0
    assert all(len(path.name.encode()) < 200 for path in (folder / FOLDER).iterdir())
    assert cache_path(folder / "a.png", "k").parent == folder / FOLDER


def test_cached_latents_reach_spawned_workers(folder):
    """As on Windows and macOS; memory is shared, not copied."""
    dataset = make_dataset(folder, flip=True)
    cache(dataset, to_disk=False)
    loader = make_loader(dataset, num_workers=1, persistent=True)
    loader.loader.multiprocessing_context = "spawn"
    for number in (1, 2):
        for a, b in zip(loader.epoch(number), epoch(dataset, number), strict=True):
            assert a.paths == b.paths and torch.equal(a.latents, b.latents)
    assert all(stack.is_shared() for stack in dataset.latents.stacks.values())


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_each_has_all(folder, tmp_path, world, to_disk):
    """Threads in the place of processes; `gather` as all_gather_object."""
    sent, meet = [None] * world, threading.Barrier(world)

    def gathering(rank):
        def gather(value):
            sent[rank] = value
            meet.wait(20)
            values = list(sent)
            meet.wait(20)
            return values

        return gather

    parts, vaes = [make_dataset(folder, flip=True) for _ in range(world)], [FakeVae() for _ in range(world)]

    def work(rank):
        parts[rank].cache_latents(
            vaes[rank], batch_size=3, to_disk=to_disk, fingerprint="vae 1", workers=2, share=(rank, world), gather=gathering(rank)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = make_dataset(folder, flip=True)
    vae = cache(alone, to_disk=False)
    assert sum(v.images for v in vaes) == vae.images and all(v.images for v in vaes)
    for row in range(len(alone.table)):
        for flipped in (False, True):
            expected = alone.latents.get(row, flipped)[0]
            assert all(torch.equal(part.latents.get(row, flipped)[0], expected) for part in parts)


def test_images_in_a_folder_that_is_no_utf8_are_cached(not_utf8):
    folder = make_folder(not_utf8 / "images")
    cache(make_dataset(folder))
    assert cache(make_dataset(folder)).batches == []
