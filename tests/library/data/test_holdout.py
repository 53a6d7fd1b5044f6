"""Which images are held out: by image, disjoint, whatever the order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.data.dataset import TrainingDataset
from library.data.loader import make_loader
from library.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """20 images in `cats`, the same names smaller in `small`, 4 in `reg`."""
    root = tmp_path_factory.mktemp("held")
    for folder, count, side in (("cats", 20, 64), ("small", 20, 32), ("reg", 4, 64)):
        (root / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (side, side), (number * 10, 0, 0)).save(
                root / folder / f"{folder[:1] if folder == 'reg' else ''}{number:02d}.png"
            )
            (root / folder / f"{number:02d}.txt").write_text(f"cat {number}, red", encoding="utf-8")
    return root


def dataset(root: Path, text: str, seed: int = 1) -> TrainingDataset:
    config = _written(root, '[general]\ncaption_extension = ".txt"\n' + text)
    return TrainingDataset(datasets_from_file(config, DatasetDefaults()), seed=seed)


def _written(root: Path, text: str) -> Path:
    path = root / "data.toml"
    path.write_text(text.replace("ROOT", root.as_posix()), encoding="utf-8")
    return path


def paths(data: TrainingDataset, epoch: int = 1) -> list[str]:
    return [path for batch in make_loader(data).epoch(epoch) for path in batch.paths]


CATS = '[[datasets]]\nresolution = 64\nbatch_size = 3\nvalidation_split = 0.25\n[[datasets.subsets]]\nimage_dir = "ROOT/cats"\n'


def test_trap_4_6_training_and_validation_parts_are_disjoint_without_a_validation_seed(folders):
    data = dataset(folders, CATS)
    held, trained = paths(data.validation()), paths(data)
    assert len(held) == 5 and len(trained) == 15
    assert not set(held) & set(trained) and len({*held, *trained}) == 20
    assert all(not set(held) & set(paths(data, epoch)) for epoch in (2, 3))
    assert data.describe()[0].num_train_images == 15 and data.describe()[0].num_validation_images == 5
    assert sum(data.describe()[0].tag_frequency["cats"].values()) == 30


def test_the_part_follows_from_names_and_seed_and_not_from_the_order(folders, tmp_path):
    held = paths(dataset(folders, CATS).validation())
    assert held == paths(dataset(folders, CATS, seed=1).validation())
    assert set(held) != set(paths(dataset(folders, CATS, seed=2).validation()))
    seeded = CATS.replace("batch_size = 3", "validation_seed = 7")
    assert set(paths(dataset(folders, seeded, seed=1).validation())) == set(paths(dataset(folders, seeded, seed=2).validation()))
    # Two folders in either order, or all files in one: the same names are held out.
    both = "[[datasets]]\nresolution = 32\nvalidation_split = 0.25\n" + "".join(
        f'[[datasets.subsets]]\nimage_dir = "ROOT/{folder}"\n' for folder in ("cats", "small")
    )
    names = sorted(Path(path).stem for path in paths(dataset(folders, both).validation()))
    assert names == sorted(Path(path).stem for path in held for _ in range(2)), "a motif in two sizes stays together"
    turned = both.replace("cats", "x").replace("small", "cats").replace("x", "small")
    assert names == sorted(Path(path).stem for path in paths(dataset(folders, turned).validation()))


def test_an_image_held_out_in_one_dataset_is_trained_on_in_none(folders):
    other = '[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = "ROOT/cats"\n'
    data = dataset(folders, CATS + other)
    held, trained = paths(data.validation()), paths(data)
    assert len(held) == 5 and len(trained) == 30 and not set(held) & set(trained)


def test_regularisation_images_are_not_held_out_and_match_what_is_trained(folders):
    data = dataset(folders, CATS + '[[datasets.subsets]]\nimage_dir = "ROOT/reg"\nis_reg = true\n')
    assert not data.table.held_out[data.table.is_reg()].any()
    assert data.table.repeats[data.table.is_reg()].sum() == 15


def test_held_out_images_are_shown_unchanged(folders):
    noisy = "shuffle_caption = true\ncaption_dropout_rate = 1.0\nflip_aug = true\ncolor_aug = true\nnum_repeats = 3\n"
    plain, changed = (dataset(folders, CATS + more).validation() for more in ("", noisy))
    assert plain.num_batches == changed.num_batches == 2
    for key in ((1, 0), (1, 1)):
        assert changed[key].captions == plain[key].captions and all(changed[key].captions)
        assert np.array_equal(changed[key].images, plain[key].images)


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.99, 19), (0.5, 10)])
def test_at_least_one_is_held_out_and_never_all(folders, share, count):
    assert len(paths(dataset(folders, CATS.replace("0.25", str(share))).validation())) == count


def test_nothing_to_hold_out_is_reported(folders, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "only.png")
    text = f'[[datasets]]\nresolution = 64\nvalidation_split = 0.5\n[[datasets.subsets]]\nimage_dir = "{tmp_path.as_posix()}"\n'
    with pytest.raises(UserError, match="validation_split holds out no image"):
        dataset(folders, text)
    with pytest.raises(UserError, match="validation_split = 1.0: expected below 1"):
        dataset(folders, CATS.replace("0.25", "1.0"))
    assert dataset(folders, CATS.replace("0.25", "0.0")).validation() is None


def test_trap_4_7_a_dataset_from_a_metadata_file_is_split_too(folders):
    names = [f"{number:02d}" for number in range(20)]
    (folders / "meta.json").write_text(json.dumps({name: {"caption": f"cat {name}"} for name in names}), encoding="utf-8")
    from_json = CATS.replace('image_dir = "ROOT/cats"', 'image_dir = "ROOT/cats"\nmetadata_file = "ROOT/meta.json"')
    data = TrainingDataset(datasets_from_file(_written(folders, from_json), DatasetDefaults()), seed=1)
    held, trained = paths(data.validation()), paths(data)
    assert len(held) == 5 and len(trained) == 15 and not set(held) & set(trained)
    assert set(held) == set(paths(dataset(folders, CATS).validation())), "the same ones as from the folder"
