"""Folders without a dataset file: a folder that has pictures in it is never "no data found"."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from library.data.config import DatasetDefaults, SubsetConfig, datasets_from_folders
from library.data.folders import image_suffixes, list_images
from library.errors import UserError


def make(parent: Path, *names: str) -> None:
    for name in names:
        path = parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def subsets(train: Path, reg: Path | None = None, **defaults) -> list[SubsetConfig]:
    (dataset,) = datasets_from_folders(train, reg, DatasetDefaults(resolution=512, **defaults))
    return list(dataset.subsets)


def found(train: Path, **defaults) -> list[tuple[str, int, str | None]]:
    return [(s.image_dir.relative_to(train).as_posix(), s.num_repeats, s.class_tokens) for s in subsets(train, **defaults)]


def test_folders_named_by_the_rule_in_sorted_order(tmp_path):
    make(tmp_path, "5_dog/1.png", "20_sks_dog girl/1.png", "10_cat/1.JPG")
    assert found(tmp_path) == [("10_cat", 10, "cat"), ("20_sks_dog girl", 20, "sks_dog girl"), ("5_dog", 5, "dog")]


def test_a_plain_folder_of_pictures_is_used_once(tmp_path, caplog):
    make(tmp_path, "1.png", "2.webp", "notes.txt")
    assert found(tmp_path) == [(".", 1, None)]
    assert found(tmp_path, num_repeats=4) == [(".", 4, None)], "--dataset_repeats"


def test_pictures_beside_folders_of_the_rule_are_used_as_well(tmp_path):
    make(tmp_path, "1.png", "10_cat/1.png")
    assert found(tmp_path, num_repeats=3) == [(".", 3, None), ("10_cat", 10, "cat")]


def test_folders_that_follow_no_rule_are_used_if_there_is_nothing_else(tmp_path, caplog):
    make(tmp_path, "cats/1.png", "dogs/1.png", "empty/readme.md")
    assert found(tmp_path) == [("cats", 1, None), ("dogs", 1, None)]
    assert "<repeats>_<class>" in caplog.text and "cats, dogs" in caplog.text


def test_one_level_deeper(tmp_path, caplog):
    make(tmp_path, "a/b/1.png", "a/c/1.png")
    assert found(tmp_path) == [("a/b", 1, None), ("a/c", 1, None)]
    make(tmp_path, "10_cat/inner/1.png")
    assert found(tmp_path) == [("10_cat/inner", 10, "cat")]
    assert "10_cat: no picture lies in the folder itself" in caplog.text


def test_nothing_is_left_out_without_a_word(tmp_path, caplog):
    make(tmp_path, "10_cat/1.png", "backup/1.png", "0_dog/1.png", "3_empty/readme.txt")
    assert found(tmp_path) == [("10_cat", 10, "cat")]
    for name in ("backup", "0_dog", "3_empty"):
        assert name in caplog.text, name


def test_a_number_alone_counts_and_is_said(tmp_path, caplog):
    make(tmp_path, "5/1.png")
    assert found(tmp_path) == [("5", 5, "")]
    assert "used 5 times" in caplog.text


def test_giving_the_inner_folder_is_pointed_out(tmp_path, caplog):
    make(tmp_path, "10_cat/1.png")
    assert found(tmp_path / "10_cat") == [(".", 1, None)]
    assert "give the folder above" in caplog.text


def test_repeats_beyond_all_use_name_the_folder(tmp_path):
    make(tmp_path, "99999999999999999999_cat/1.png")
    with pytest.raises(UserError, match="9_cat: num_repeats = 99999999999999999999: expected at most 1,000,000"):
        found(tmp_path)


def test_regularisation_folders(tmp_path):
    make(tmp_path, "train/10_sks cat/1.png", "reg/1_cat/1.png", "plain/1.png")
    both = subsets(tmp_path / "train", tmp_path / "reg")
    assert [(s.class_tokens, s.num_repeats, s.is_reg) for s in both] == [("sks cat", 10, False), ("cat", 1, True)]
    assert [s.is_reg for s in subsets(tmp_path / "train", tmp_path / "plain")] == [False, True]


def test_the_command_line_holds_for_all_subsets(tmp_path):
    make(tmp_path, "10_cat/1.png", "2_dog/1.png")
    assert all(
        s.flip_aug and s.keep_tokens == 2 and s.num_repeats > 1
        for s in subsets(tmp_path, flip_aug=True, keep_tokens=2, num_repeats=1)
    )


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "text only"])
def test_no_pictures_is_an_error_that_says_where_and_what(tmp_path, kind):
    folder = tmp_path / "train"
    if kind == "file":
        make(tmp_path, "train")
    elif kind == "text only":
        make(tmp_path, "train/a/1.txt", "train/b/c/d/1.png")
    elif kind == "empty":
        folder.mkdir()
    with pytest.raises(UserError) as caught:
        subsets(folder)
    message = str(caught.value)
    assert f"--train_data_dir={folder}" in message
    assert {"missing": "no such folder", "file": "is a file"}.get(kind, ".png .jpg") in message


def test_no_resolution_names_the_option(tmp_path):
    make(tmp_path, "1.png")
    with pytest.raises(UserError, match="--resolution=512"):
        datasets_from_folders(tmp_path, None, DatasetDefaults())


def test_which_files_are_pictures(tmp_path):
    names = ["b.png", "a.JPEG", "ü ñ.webp", "c.Bmp", "d.jpg", "e.gif", "f.GIF", "g.tif", "h.Tiff"]
    make(tmp_path, *names, "x.txt", "y.npz", "._b.png", ".hidden.png", "z.heic")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == sorted(names)
    assert set(image_suffixes()) >= {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def test_a_folder_of_gif_pictures_only_is_used(tmp_path, caplog):
    make(tmp_path, "10_cat/1.gif", "10_cat/2.GIF")
    assert found(tmp_path) == [("10_cat", 10, "cat")] and not caplog.text


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path, caplog):
    make(tmp_path, "1.png", "a.heic", "b.psd", *(f"{number:02d}.svg" for number in range(11)))
    assert found(tmp_path) == [(".", 1, None)]
    assert "00.svg, 01.svg" in caplog.text and "and 3 more; convert them" in caplog.text


def test_trap_4_16_folders_come_in_sorted_order_however_the_system_lists_them(tmp_path, monkeypatch):
    make(tmp_path, "b_plain/x/1.png", "a_plain/1.png", "2_dog/1.png", "10_cat/1.png", "1_cat/b.png", "1_cat/a.png")
    monkeypatch.setattr("library.data.folders.os.scandir", listed_backwards)
    assert [name for name, _, _ in found(tmp_path)] == ["10_cat", "1_cat", "2_dog"]
    assert [path.name for path in list_images(tmp_path / "1_cat")] == ["a.png", "b.png"]
    for name in ("10_cat", "1_cat", "2_dog"):
        (tmp_path / name).rename(tmp_path / f"{name[-3:]} {name[0]}{len(name)}")
    assert [name for name, _, _ in found(tmp_path)] == ["a_plain", "b_plain/x", "cat 15", "cat 16", "dog 25"]


@contextmanager
def listed_backwards(folder):
    yield (entry for entry in sorted(map(Entry, Path(folder).iterdir()), key=lambda e: e.name, reverse=True))


class Entry:
    def __init__(self, path: Path) -> None:
        self.name, self.is_dir = path.name, path.is_dir


def test_trap_4_16_dataset_repeats_counts_only_where_no_folder_name_says_a_number(tmp_path):
    make(tmp_path, "train/1.png", "train/10_cat/1.png", "reg/1_cat/1.png", "plain/1.png")
    both = subsets(tmp_path / "train", tmp_path / "reg", num_repeats=3)
    assert [s.num_repeats for s in both] == [3, 10, 1]
    assert [s.num_repeats for s in subsets(tmp_path / "plain", tmp_path / "reg", num_repeats=3)] == [3, 1]
    assert [s.num_repeats for s in subsets(tmp_path / "train", tmp_path / "plain", num_repeats=3)] == [3, 10, 3]
