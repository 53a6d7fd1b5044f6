"""Folders without a dataset file: a folder that has images in it is never "no data found"."""

from __future__ import annotations

import os
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from library.data.config import datasets_from_file, datasets_from_folders
from library.data.config_keys import DatasetDefaults, SubsetConfig
from library.data.folders import image_suffixes, list_images
from library.data.images import decode, own_mark
from library.data.index import index_folders
from library.data.table import build_table
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


def test_a_plain_folder_of_images_is_used_once(tmp_path, caplog):
    make(tmp_path, "1.png", "2.webp", "notes.txt")
    assert found(tmp_path) == [(".", 1, None)]
    assert found(tmp_path, num_repeats=4) == [(".", 4, None)], "--dataset_repeats"


def test_images_beside_folders_of_the_rule_are_used_as_well(tmp_path):
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
    assert "10_cat: no image lies in the folder itself" in caplog.text


def test_nothing_is_left_out_without_a_word(tmp_path, caplog):
    make(tmp_path, "10_cat/1.png", "backup/1.png", "0_dog/1.png", "3_empty/readme.txt")
    assert found(tmp_path) == [("10_cat", 10, "cat")]
    for name in ("backup", "0_dog", "3_empty"):
        assert name in caplog.text, name


def test_a_number_alone_counts_and_is_reported(tmp_path, caplog):
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
def test_no_images_is_an_error_that_says_where_and_what(tmp_path, kind):
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


def test_which_files_are_images(tmp_path):
    names = ["b.png", "a.JPEG", "ü ñ.webp", "c.Bmp", "d.jpg", "e.gif", "f.GIF", "g.tif", "h.Tiff"]
    make(tmp_path, *names, "x.txt", "y.npz", "._b.png", ".hidden.png", "z.heic")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == sorted(names)
    assert set(image_suffixes()) >= {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def test_a_folder_of_gif_images_only_is_used(tmp_path, caplog):
    make(tmp_path, "10_cat/1.gif", "10_cat/2.GIF")
    assert found(tmp_path) == [("10_cat", 10, "cat")] and not caplog.text


def test_images_of_kinds_that_are_not_read_are_named(tmp_path, caplog):
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


# Files and folders that are left out are named


def test_images_that_are_not_read_are_named_by_suffix_or_content(tmp_path, caplog):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for name in ("b.heic", "b.dng", "b.EXR", "b.psd", "without suffix", "copy.png~", "c.png.1"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    for name in ("a.txt", "a.caption", "notes", "model.safetensors", "a.npz"):
        (tmp_path / name).write_text("nothing to look at", encoding="utf-8")
    assert found(tmp_path) == [(".", 1, None)]
    assert "images left out: b.EXR, b.dng, b.heic, b.psd, c.png.1, copy.png~, without suffix; convert" in caplog.text


@pytest.mark.parametrize("suffix", [".apng", ".jpe", ".jfif", ".jpg_large", ".dib", ".ppm", ".pgm", ".jp2", ".avifs", ".ico"])
def test_suffixes_of_kinds_that_pillow_reads_count(tmp_path, suffix, caplog):
    if suffix not in image_suffixes():
        pytest.skip("this Pillow cannot read it")
    kinds = {".apng": "PNG", ".dib": "DIB", ".ppm": "PPM", ".pgm": "PPM", ".jp2": "JPEG2000", ".avifs": "AVIF", ".ico": "ICO"}
    Image.new("RGB", (64, 64), "red").save(tmp_path / f"a{suffix}", kinds.get(suffix, "JPEG"))
    assert found(tmp_path) == [(".", 1, None)]
    assert f"images of unusual kinds are used too: a{suffix}" in caplog.text
    assert index_folders([tmp_path])[tmp_path].sizes.tolist() == [[64, 64]]
    assert decode((tmp_path / f"a{suffix}").read_bytes())[0, 0, 0] > 200


def test_images_in_folders_inside_a_subset_are_named(tmp_path, caplog):
    make(tmp_path, "10_cat/a.png", "10_cat/more/b.png", "10_cat/more/deep/c.png", "10_cat/.latents/d.png", "10_cat/empty/e.txt")
    assert found(tmp_path) == [("10_cat", 10, "cat")]
    assert f"10_cat: images in folders inside it are left out: more, {os.path.join('more', 'deep')}; give" in caplog.text


def test_folders_inside_that_other_subsets_use_are_not_named(tmp_path, caplog):
    make(tmp_path, "cat/a.png", "cat/more/b.png", "cat/masks/a.png", "cat/left/c.png")
    names = {"image_dir": "cat", "conditioning_data_dir": "cat/masks"}
    first = "".join(f'{key} = "{(tmp_path / name).as_posix()}"\n' for key, name in names.items())
    second = f'image_dir = "{(tmp_path / "cat/more").as_posix()}"\n'
    table = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{first}[[datasets.subsets]]\n{second}"
    (tmp_path / "data.toml").write_text(table, encoding="utf-8")
    datasets_from_file(tmp_path / "data.toml", DatasetDefaults())
    assert caplog.text.count("images in folders inside it are left out: left; give") == 1


def test_samples_of_training_inside_are_not_named(tmp_path, caplog):
    make(tmp_path, "10_cat/a.png", "10_cat/sample/x.txt")
    Image.new("RGB", (64, 64)).save(tmp_path / "10_cat" / "sample" / "s.png", pnginfo=own_mark("sample"))
    subsets(tmp_path)
    assert "inside it" not in caplog.text


# Names and links


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="links need rights there; accents are all alike here")
def test_accents_of_either_form_and_links_in_a_circle(tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "café") / unicodedata.normalize("NFC", "ä")
    Path(folder).mkdir(parents=True)
    for form in ("NFC", "NFD"):
        Image.new("RGB", (64, 64)).save(folder / f"{unicodedata.normalize(form, 'é')}{form}.png")
        other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "é")
        (folder / f"{other}{form}.txt").write_text(form, encoding="utf-8")
    os.symlink("me", folder / "me")
    os.symlink("..", folder / "up")
    typed = tmp_path / unicodedata.normalize("NFC", "café") / unicodedata.normalize("NFD", "ä")
    (dataset,) = datasets_from_folders(typed, None, DatasetDefaults(resolution=64, caption_extension=".txt"))
    assert sorted(build_table([dataset]).captions) == ["NFC", "NFD"]
    table = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{typed}"\n'
    (tmp_path / "data.toml").write_text(table, encoding="utf-8")
    assert datasets_from_file(tmp_path / "data.toml", DatasetDefaults())[0].subsets[0].image_dir == folder


@pytest.mark.skipif(sys.platform == "win32", reason="names of another kind")
def test_a_long_name_of_an_image_has_no_longer_name_of_a_caption(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / f"{'x' * 251}.png")
    (dataset,) = datasets_from_folders(tmp_path, None, DatasetDefaults(resolution=64, caption_extension=".caption"))
    assert build_table([dataset]).captions == [""]


@pytest.mark.parametrize("key", ["image_dir", "conditioning_data_dir", "metadata_file"])
def test_a_path_that_the_system_will_not_look_at_is_one_line(tmp_path, key):
    values = {"image_dir": tmp_path.as_posix(), key: "x" * 300}
    lines = "".join(f'{name} = "{value}"\n' for name, value in values.items())
    (tmp_path / "data.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{lines}", encoding="utf-8")
    make(tmp_path, "a.png")
    with pytest.raises(UserError, match="xxx"):
        datasets_from_file(tmp_path / "data.toml", DatasetDefaults())
