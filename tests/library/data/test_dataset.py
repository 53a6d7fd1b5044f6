"""Batches: every image as often as asked for, the same with any number of workers, with what training needs to know."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.data.debug import write_debug_sheet
from library.data.loader import EpochSampler, make_loader
from library.data.table import balanced
from library.data.tokens import CaptionTokenizer
from library.errors import UserError
from library.models.clip import load_tokenizer

SIZES = [(64, 64), (96, 48), (48, 96), (80, 60), (200, 100), (30, 30)]


def make_folder(folder, count, sizes=SIZES, captions=True):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        if captions:
            (folder / f"{number:03d}.txt").write_text(f"dog, number {number}, Blue sky", encoding="utf-8")
    return folder


def subset(folder, **keys):
    return SubsetConfig(image_dir=folder, **{"caption_extension": ".txt", **keys})


def config(*subsets, **keys):
    return DatasetConfig(
        **{
            "resolution": 64,
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 16,
            "batch_size": 3,
            "subsets": subsets,
            **keys,
        }
    )


def used(dataset, epoch):
    """Names of the images of an epoch with their number of uses."""
    return Counter(path[-7:] for position in range(len(dataset)) for path in dataset[(epoch, position)].paths)


def same(a, b):
    assert a.captions == b.captions and a.paths == b.paths and a.key == b.key and a.size == b.size
    for name in ("images", "latents", "sizes", "loss_weights"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None) and (left is None or torch.equal(left, right))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "dog", 20)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def lively(folder):
    return config(subset(folder, shuffle_caption=True, flip_aug=True, color_aug=True, random_crop=True, caption_dropout_rate=0.2))


def test_a_batch_holds_what_training_needs(folder, tokenizer):
    dataset = TrainingDataset([config(subset(folder))], seed=1, tokenizer=CaptionTokenizer([tokenizer]))
    assert len(dataset) == dataset.num_batches
    for position in range(len(dataset)):
        batch = dataset[(1, position)]
        count = len(batch.paths)
        assert 1 <= count <= 3 and batch.key == (1, position) and batch.latents is None
        assert batch.images.shape == (count, 3, batch.size[1], batch.size[0]) and batch.images.dtype == torch.float32
        assert batch.images.min() >= -1 and batch.images.max() <= 1 and batch.images.min() < -0.8 and batch.images.max() > 0.8
        assert batch.tokens["ids"].shape == (count, 1, 77) and batch.tokens.keys() == {"ids"}
        assert batch.loss_weights.tolist() == [1.0] * count
        for path, caption in zip(batch.paths, batch.captions, strict=True):
            assert caption == f"dog, number {int(path[-7:-4])}, Blue sky"


def test_pixels_are_the_images(folder):
    dataset = TrainingDataset([config(subset(folder), batch_size=1)], seed=1)
    for position in range(len(dataset)):
        batch = dataset[(1, position)]
        if batch.paths[0].endswith("000.png"):
            original = np.asarray(Image.open(batch.paths[0])).astype(np.float32) / 127.5 - 1
            assert np.allclose(batch.images[0].permute(1, 2, 0).numpy(), original, atol=1e-6)
            return
    raise AssertionError("image 000.png was not served")


@pytest.mark.parametrize("size", SIZES + [(1, 500), (500, 1)])
def test_without_buckets_every_image_is_resized_to_cover_and_cut(tmp_path, size):
    folder = make_folder(tmp_path, 1, [size])
    dataset = TrainingDataset([config(subset(folder), enable_bucket=False, resolution=(64, 48))], seed=1)
    assert dataset[(1, 0)].images.shape == (1, 3, 48, 64)


def test_trap_4_2_each_image_once_per_epoch_with_persistent_workers(folder):
    dataset = TrainingDataset([config(subset(folder))], seed=5)
    loader = make_loader(dataset, num_workers=2, persistent=True)
    for epoch in (1, 2, 3):
        names = Counter(path[-7:] for batch in loader.epoch(epoch) for path in batch.paths)
        assert len(names) == 20 and set(names.values()) == {1}


def test_trap_4_4_order_comes_from_the_epoch_itself_and_the_seed(folder):
    dataset = TrainingDataset([config(subset(folder))], seed=5)
    orders = {epoch: [dataset.epoch_order(epoch)[i].tolist() for i in range(len(dataset))] for epoch in (1, 2, 3)}
    assert orders[1] != orders[2] != orders[3] != orders[1]
    again = TrainingDataset([config(subset(folder))], seed=5)
    assert [again.epoch_order(2)[i].tolist() for i in range(len(again))] == orders[2]
    other = TrainingDataset([config(subset(folder))], seed=6)
    assert [other.epoch_order(1)[i].tolist() for i in range(len(other))] != orders[1]
    # Not only the order of the batches changes from epoch to epoch, but what is in them.
    assert {tuple(sorted(batch)) for batch in orders[1]} != {tuple(sorted(batch)) for batch in orders[2]}


def test_trap_4_1_global_generators_are_left_alone(folder):
    random.seed(123), np.random.seed(123), torch.manual_seed(123)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    dataset = TrainingDataset([lively(folder)], seed=5)
    for workers in (0, 1):
        for _ in make_loader(dataset, num_workers=workers).epoch(1):
            pass
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_repeats_and_batches_of_one_bucket(folder):
    dataset = TrainingDataset([config(subset(folder, num_repeats=3))], seed=1)
    for epoch in (1, 2):
        assert set(used(dataset, epoch).values()) == {3}
    facts = dataset.describe()[0]
    assert len(dataset) == sum(math.ceil(bucket.with_repeats / 3) for bucket in facts.buckets)


def test_datasets_do_not_mix(folder, tmp_path):
    other = make_folder(tmp_path / "cat", 4)
    small = config(subset(folder), resolution=32, min_bucket_reso=16, batch_size=5)
    dataset = TrainingDataset([config(subset(folder), subset(other)), small], seed=1)
    assert sum(used(dataset, 1).values()) == 20 + 4 + 20
    batches = [dataset[(1, position)] for position in range(len(dataset))]
    for batch in batches:
        area = batch.size[0] * batch.size[1]
        assert len(batch.paths) <= (3 if area > 32 * 32 else 5)
    # Batches of the datasets come by turns, not one dataset after the other.
    areas = [batch.size[0] * batch.size[1] > 32 * 32 for batch in batches]
    assert sum(a != b for a, b in pairwise(areas)) > 2


def test_trap_4_5_regularisation_images_keep_their_own_settings(folder, tmp_path):
    reg = make_folder(tmp_path / "reg", 6, captions=False)
    parts = (subset(reg, is_reg=True, class_tokens="a dog", num_repeats=2), subset(folder, flip_aug=True))
    dataset = TrainingDataset([config(*parts)], seed=1, prior_loss_weight=0.25)
    batches = [dataset[(1, position)] for position in range(len(dataset))]
    weights = Counter()
    for batch in batches:
        for path, caption, weight in zip(batch.paths, batch.captions, batch.loss_weights.tolist(), strict=True):
            is_reg = str(reg) in path
            assert weight == (0.25 if is_reg else 1.0) and (caption == "a dog") == is_reg
            weights[is_reg] += 1
    assert weights == {True: 20, False: 20}
    # flip_aug of the last subset does not reach the first one's images.
    for epoch in range(1, 6):
        for position in range(len(dataset)):
            batch = dataset[(epoch, position)]
            for path, image in zip(batch.paths, batch.images, strict=True):
                if path == str(reg / "000.png"):
                    assert np.array_equal(((image + 1) * 127.5).round().numpy(), np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_balancing_of_regularisation_images(folder, tmp_path, caplog):
    assert balanced(np.array([1, 1, 1]), 7).tolist() == [3, 2, 2]
    assert balanced(np.array([2, 3, 1]), 4).tolist() == [2, 2, 0]
    reg = make_folder(tmp_path / "reg", 30, captions=False)
    with caplog.at_level(logging.WARNING):
        dataset = TrainingDataset([config(subset(folder), subset(reg, is_reg=True, class_tokens="x"))], seed=1)
    assert "left out 10 of 30 regularisation images" in caplog.text
    assert dataset.describe()[0].num_reg_images == 30 and int(dataset.table.repeats.sum()) == 40
    with pytest.raises(UserError, match="no images to train on"):
        TrainingDataset([config(subset(reg, is_reg=True))], seed=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_the_same_with_any_number_of_workers(folder, tokenizer, workers, monkeypatch):
    monkeypatch.setattr("library.data.loader.cores_for_this_process", lambda: 4)
    dataset = TrainingDataset([lively(folder)], seed=9, tokenizer=CaptionTokenizer([tokenizer]))
    loader = make_loader(dataset, num_workers=workers, persistent=True)
    for epoch in (1, 2):
        for position, batch in enumerate(loader.epoch(epoch)):
            same(batch, dataset[(epoch, position)])
        assert position == len(dataset) - 1 == len(loader) - 1


def test_a_pickled_dataset_is_small_and_gives_the_same(folder, tokenizer):
    """On Windows and macOS each loader process gets it so; test_cache.py starts one."""
    assert len(pickle.dumps(TrainingDataset([lively(folder)], seed=9))) < 20_000
    dataset = TrainingDataset([lively(folder)], seed=9, tokenizer=CaptionTokenizer([tokenizer]))
    same(pickle.loads(pickle.dumps(dataset))[(3, 2)], dataset[(3, 2)])


def test_resuming_in_the_middle_of_an_epoch(folder):
    dataset = TrainingDataset([lively(folder)], seed=9)
    loader = make_loader(dataset, num_workers=2, persistent=True)
    whole = list(loader.epoch(2))
    next(loader.epoch(1))  # left early: the rest must not show up later
    rest = list(loader.epoch(2, start=4))
    assert len(rest) == len(whole) - 4
    for a, b in zip(rest, whole[4:], strict=True):
        same(a, b)


def test_trap_4_17_persistent_with_no_workers_is_no_error(folder, monkeypatch):
    dataset = TrainingDataset([config(subset(folder))], seed=1)
    assert len(list(make_loader(dataset, num_workers=0, persistent=True).epoch(1))) == len(dataset)
    monkeypatch.setattr("library.data.loader.cores_for_this_process", lambda: 1)
    assert make_loader(dataset, num_workers=8).num_workers == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to a single process")
def test_workers_leave_ctrl_c_to_the_trainer(folder):
    dataset = TrainingDataset([config(subset(folder), batch_size=1)], seed=1)
    for served, _ in enumerate(make_loader(dataset, num_workers=1).epoch(1), start=1):
        if served == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
    assert served == len(dataset)


def test_processes_share_an_epoch(folder):
    dataset = TrainingDataset([config(subset(folder))], seed=1)
    dataset.world = 3
    shares = [[position for _, position in EpochSampler(dataset, 1, rank=rank, world=3)] for rank in range(3)]
    assert len(shares[0]) == math.ceil(len(dataset) / 3) and sorted(sum(shares, [])) == list(range(len(dataset)))
    assert list(EpochSampler(dataset, 4, start=1, rank=2, world=3)) == [(4, position) for position in shares[2][1:]]


def test_a_process_without_a_last_batch_gets_none_in_its_place(folder):
    dataset = TrainingDataset([config(subset(folder), batch_size=1)], seed=1)
    world = len(dataset) - 1  # two turns, and in the second only process 0 has a batch
    served = [[batch and batch.key[1] for batch in make_loader(dataset, rank=rank, world=world).epoch(1)] for rank in (0, 1)]
    assert served == [[0, world], [1, None]]


def test_steps_for_the_tag_warm_up(folder):
    dataset = TrainingDataset([config(subset(folder), batch_size=2)], seed=1, gradient_accumulation_steps=4)
    count = len(dataset)
    assert [dataset.step_of(1, position) for position in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert dataset.step_of(3, 0) == 2 * math.ceil(count / 4)
    warm = TrainingDataset([config(subset(folder, token_warmup_step=0.5), batch_size=2)], seed=1)
    warm.max_train_steps = 2 * count
    assert set(warm[(1, 0)].captions[0].split(", ")) == {"dog"} and "Blue sky" in warm[(2, 0)].captions[0]


def test_trap_4_3_whole_epochs_of_caption_dropout(folder):
    dataset = TrainingDataset([config(subset(folder, caption_dropout_every_n_epochs=2))], seed=1)
    loader = make_loader(dataset, num_workers=2, persistent=True)
    for epoch in (1, 2, 3, 4):
        captions = [caption for batch in loader.epoch(epoch) for caption in batch.captions]
        assert all((caption == "") == (epoch % 2 == 0) for caption in captions)


def test_flips_are_half_and_do_not_depend_on_other_settings(folder):
    dataset = TrainingDataset([config(subset(folder, flip_aug=True), batch_size=1)], seed=1)
    plain = TrainingDataset([config(subset(folder), batch_size=1)], seed=1)
    flips = []
    for epoch in (1, 2, 3, 4):
        for position in range(len(dataset)):
            a, b = dataset[(epoch, position)].images, plain[(epoch, position)].images
            flips.append(not torch.equal(a, b))
            assert torch.equal(a, b.flip(3) if flips[-1] else b)
    assert 0.35 < sum(flips) / len(flips) < 0.65


def test_random_crop_moves_and_face_crop_finds_the_face(tmp_path):
    folder = make_folder(tmp_path / "a", 1, [(200, 64)])
    dataset = TrainingDataset([config(subset(folder, random_crop=True), enable_bucket=False)], seed=1)
    assert len({dataset[(epoch, 0)].images.numpy().tobytes() for epoch in range(1, 9)}) > 5

    faces = tmp_path / "faces"
    faces.mkdir()
    pixels = np.zeros((400, 600, 3), dtype=np.uint8)
    pixels[180:220, 480:520] = 255
    Image.fromarray(pixels).save(faces / "me_500_200_40_40.png")
    dataset = TrainingDataset([config(subset(faces, face_crop_aug_range=(1.5, 3.0)), enable_bucket=False)], seed=1)
    shares = []
    for epoch in range(1, 6):
        image = dataset[(epoch, 0)].images[0]
        assert image[:, 28:36, 28:36].min() > 0.9  # the face is in the middle
        shares.append(float((image > 0).float().mean()))
    assert len(set(shares)) > 2 and min(shares) > 0.1 and max(shares) < 0.5


def test_interpolation_of_the_subset_beats_the_dataset(folder):
    parts = (subset(folder), subset(folder.parent / "dog", resize_interpolation="nearest"))
    dataset = TrainingDataset([config(*parts, resize_interpolation="box")], seed=1)
    assert (dataset.table.interpolation(0), dataset.table.interpolation(39)) == ("box", "nearest")


def test_trap_4_1_random_choices_in_captions_depend_on_the_seed_alone(tmp_path):
    folder = make_folder(tmp_path, 8, captions=False)
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("{a|b|c|d}, e, f, g, h", encoding="utf-8")
    part = subset(folder, enable_wildcard=True, shuffle_caption=True, caption_tag_dropout_rate=0.3, caption_dropout_rate=0.1)

    def captions(seed, state):
        random.seed(state)  # what the process drew before must not matter
        dataset = TrainingDataset([config(part)], seed=seed)
        return [dataset[(1, position)].captions for position in range(len(dataset))]

    drawn = [captions(seed, 0) for seed in (1, 2, 3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert [captions(seed, 7) for seed in (1, 2, 3)] == drawn


def test_more_uses_than_memory_holds_are_refused(tmp_path):
    folder = make_folder(tmp_path, 101, [(64, 64)], captions=False)
    with pytest.raises(UserError, match="101,000,000 uses of images an epoch, more than 100,000,000; lower them"):
        TrainingDataset([config(subset(folder, num_repeats=1_000_000))], seed=1)


@pytest.mark.parametrize(
    "limit, cure",
    [
        (None, "--max_token_length=150 or 225"),
        (150, "give --max_token_length=225"),
        (225, "not read"),
    ],
)
def test_trap_15_captions_that_are_cut_are_counted_and_only_a_longer_limit_is_advised(tmp_path, tokenizer, caplog, limit, cure):
    folder = make_folder(tmp_path, 1)
    (folder / "000.txt").write_text("very " * 240, encoding="utf-8")
    TrainingDataset([config(subset(folder))], seed=1, tokenizer=CaptionTokenizer([tokenizer], limit))
    assert caplog.messages[-1].endswith(cure) and ("--max_token_length" in cure or "--max" not in caplog.text)


def test_too_many_captions_to_cache_are_reported(folder, caplog):
    dataset = TrainingDataset([config(subset(folder))], seed=1)
    assert len(dataset.possible_captions(limit=20)) == 20 and not caplog.text
    assert dataset.possible_captions(limit=19) is None
    assert "more than 19 different captions" in caplog.text


def test_weighted_captions_and_long_ones(tmp_path, tokenizer, caplog):
    folder = make_folder(tmp_path, 2)
    (folder / "000.txt").write_text("(red:1.5) dog " + "very " * 90, encoding="utf-8")
    (folder / "001.txt").write_text("(red:1.5) dog", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        dataset = TrainingDataset([config(subset(folder))], seed=1, tokenizer=CaptionTokenizer([tokenizer], weighted=True))
    assert caplog.text.count("cut at 75 tokens: 1 caption, such as") == 1 and "with 92 tokens" in caplog.text
    batch = dataset[(1, 0)]
    assert batch.tokens["weights"].shape == batch.tokens["ids"].shape and batch.tokens["weights"].max() == 1.5
    long = TrainingDataset([config(subset(folder))], seed=1, tokenizer=CaptionTokenizer([tokenizer], 225))
    assert long[(1, 0)].tokens["ids"].shape[1:] == (3, 77)


def test_missing_captions_are_reported(tmp_path, caplog):
    folder = make_folder(tmp_path, 3)
    (folder / "001.txt").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = TrainingDataset([config(subset(folder))], seed=1)
    assert "1 of 3 images without a .txt file" in caplog.text and "001.png" in caplog.text
    assert dataset.table.captions[1] == ""


def test_possible_captions(folder):
    fixed = TrainingDataset([config(subset(folder))], seed=1)
    assert list(fixed.possible_captions()) == sorted(f"dog, number {i}, Blue sky" for i in range(20))
    assert set(fixed.possible_captions().values()) == {folder}
    assert fixed.possible_captions(limit=19) is None and len(fixed.possible_captions(limit=None)) == 20
    dropped = TrainingDataset([config(subset(folder, caption_dropout_rate=0.5))], seed=1)
    served = {caption for epoch in (1, 2, 3) for i in range(len(dropped)) for caption in dropped[(epoch, i)].captions}
    assert "" in served and served <= set(dropped.possible_captions())
    assert TrainingDataset([config(subset(folder, shuffle_caption=True))], seed=1).possible_captions() is None


def test_images_cut_off_are_named_from_any_worker(tmp_path, caplog):
    folder = make_folder(tmp_path, 3, [(64, 64)])
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:3000])
    dataset = TrainingDataset([config(subset(folder))], seed=1)
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            list(make_loader(dataset, num_workers=workers).epoch(1))
        assert "001.png" in str(error.value) and "Traceback" not in str(error.value)
    skipping = TrainingDataset([config(subset(folder))], seed=1, on_bad_image="skip")
    assert used(skipping, 1) == {"000.png": 1, "002.png": 1} and "001.png" in caplog.text


def test_images_that_change_or_vanish_during_training_are_named(tmp_path):
    folder = make_folder(tmp_path, 1, [(64, 64)])
    dataset = TrainingDataset([config(subset(folder))], seed=1)
    Image.new("RGB", (32, 32)).save(folder / "000.png")
    with pytest.raises(UserError, match="000.png changed its size"):
        dataset[(1, 0)]
    (folder / "000.png").unlink()
    with pytest.raises(UserError, match="000.png cannot be read"):
        dataset[(1, 0)]


def test_odd_images_end_in_a_bucket_and_are_named(tmp_path, caplog):
    folder = make_folder(tmp_path, 3, [(1, 5000), (5000, 1), (64, 64)])
    with caplog.at_level(logging.WARNING):
        for no_upscale in (False, True):
            dataset = TrainingDataset([config(subset(folder), bucket_no_upscale=no_upscale)], seed=1)
            assert sum(used(dataset, 1).values()) == 3
    assert "000.png (1x5000 to" in caplog.text and "002.png" not in caplog.text


def test_facts_for_the_metadata(folder, tmp_path):
    reg = make_folder(tmp_path / "reg", 4, captions=False)
    parts = (subset(folder, num_repeats=2), subset(reg, is_reg=True, class_tokens="a dog"))
    dataset = TrainingDataset([config(*parts), config(subset(folder), enable_bucket=False)], seed=1)
    first, second = dataset.describe()
    assert (first.num_train_images, first.num_reg_images) == (40, 4)
    assert [(part.folder, part.img_count, part.config.num_repeats) for part in first.subsets] == [("dog", 20, 2), ("reg", 4, 1)]
    assert first.tag_frequency["dog"]["blue sky"] == 20 and first.tag_frequency["dog"]["number 3"] == 1
    assert first.tag_frequency["reg"] == {"a dog": 4}
    assert sum(bucket.with_repeats for bucket in first.buckets) == 80
    buckets = first.bucket_info["buckets"]
    assert sum(entry["count"] for entry in buckets.values()) == 80 and list(buckets) == [str(i) for i in range(len(buckets))]
    errors = [
        abs(w / h - dataset.table.sizes[i][0] / dataset.table.sizes[i][1])
        for i, (w, h) in ((i, dataset.table.bucket_size(i)) for i in range(24))
    ]
    assert first.mean_img_ar_error == pytest.approx(sum(errors) / 24, rel=1e-5)
    assert second.bucket_info is None and second.num_train_images == 20
    text = dataset.bucket_table()
    assert "64 x 64" in text and "dataset 2" in text


def test_trap_4_17_debug_sheet_is_written_and_ends(folder, tmp_path, tokenizer, capsys):
    dataset = TrainingDataset([config(subset(folder))], seed=1, tokenizer=CaptionTokenizer([tokenizer]))
    path = write_debug_sheet(dataset, tmp_path / "new folder", batches=3)
    with Image.open(path) as sheet:
        assert sheet.width > 192 and len(sheet.convert("RGB").getcolors(1 << 24)) > 1000
    text = capsys.readouterr().out
    assert text.count("bucket") == 3 and "epoch 1, batch 2" in text and "caption: 'dog, number" in text and "blue sky" in text
    assert "10 tokens" in text or "tokens: dog , number" in text
