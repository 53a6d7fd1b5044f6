"""Datasets of the fine-tuning kind: images and captions from a metadata file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from library.data.config import datasets_from_file, datasets_from_metadata
from library.data.config_keys import DatasetDefaults
from library.data.dataset import TrainingDataset
from library.data.facts import describe
from library.data.table import build_table
from library.errors import UserError


@pytest.fixture
def images(tmp_path) -> Path:
    """Images a.png, b.JPG and deep/c.d.webp."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "deep/c.d.webp"):
        Image.new("RGB", (64, 64), "red").save(folder / name)
    return folder


def written(folder: Path, content, name: str = "meta.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def table(path: Path, image_dir: Path | None, on_bad_image: str = "refuse", **defaults):
    return build_table(datasets_from_metadata(path, image_dir, DatasetDefaults(resolution=64, **defaults)), on_bad_image)


def captions(path: Path, image_dir: Path | None, **defaults) -> dict[str, str]:
    made = table(path, image_dir, **defaults)
    return dict(zip(made.names, made.captions, strict=True))


def test_trap_4_18_keys_with_or_without_suffix_below_the_folder_or_as_whole_paths(images, tmp_path, monkeypatch):
    entries = {"a": {"caption": "one"}, "b.JPG": {"caption": "two"}, str(images / "deep" / "c.d"): {"caption": "three"}}
    path = written(tmp_path, entries)
    wanted = {"a.png": "one", "b.JPG": "two", "deep/c.d.webp": "three"}
    assert captions(path, images) == wanted
    monkeypatch.chdir(tmp_path)  # paths as seen from where one works, with no folder given
    relative = written(tmp_path / "images", {"images/a": {"caption": "one"}, "deep/c.d.webp": {"caption": "three"}})
    assert captions(relative, None) == {"a.png": "one", "deep/c.d.webp": "three"}
    made = table(written(tmp_path, {str(images / "a.png"): {"tags": "x"}}, "other.json"), images / "deep")
    assert made.path(0) == images / "a.png", "an image outside of the folder keeps its whole path"


def test_caption_and_tags_are_joined(images, tmp_path):
    entries = {"a": {"caption": "a cat\na dog", "tags": "red, blue"}, "b": {"tags": "green"}, "deep/c.d": {"caption": None}}
    path = written(tmp_path, entries)
    assert captions(path, images) == {"a.png": "a cat, red, blue", "b.JPG": "green", "deep/c.d.webp": ""}
    lines = captions(path, images, enable_wildcard=True, caption_separator=";")
    assert lines["a.png"] == "a cat;red, blue\na dog;red, blue"


def test_lines_of_a_jsonl_file(images, tmp_path):
    lines = '{"image_path": "a.png", "caption": "one", "image_size": [64, 64]}\n\n{"image_path": "b", "tags": "t"}\n'
    assert captions(written(tmp_path, lines, "meta.jsonl"), images) == {"a.png": "one", "b.JPG": "t"}


def test_batches_use_the_captions_with_all_their_options(images, tmp_path):
    path = written(tmp_path, {"a": {"caption": "x, y", "tags": "z"}})
    defaults = DatasetDefaults(
        resolution=64, caption_prefix="pre", caption_suffix="suf", num_repeats=3, caption_tag_dropout_rate=1.0, keep_tokens=1
    )
    dataset = TrainingDataset(datasets_from_metadata(path, images, defaults), seed=1)
    assert dataset.num_batches == 3 and dataset[(1, 0)].captions == ["pre x"]


def test_counts_stand_under_the_file_s_name_and_tags_alone_are_counted(images, tmp_path):
    path = written(tmp_path, {"a": {"caption": "cat", "tags": "Red, blue"}, "b": {"caption": "cat", "tags": "red"}})
    (facts,) = describe(table(path, images))
    assert facts.tag_frequency == {"meta.json": {"red": 2, "blue": 1}}
    assert facts.subsets[0].folder == "meta.json" and facts.num_train_images == 2


def test_dataset_files_may_name_metadata_files(images, tmp_path):
    written(tmp_path, {"a": {"caption": "one"}, "b": {"caption": "two"}})
    config = tmp_path / "data.toml"
    text = "[general]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets]]\n"
    subset = "[[datasets.subsets]]\nmetadata_file = 'meta.json'\nimage_dir = 'images'\nflip_aug = true\n"
    folder = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\n"
    config.write_text(text + subset + folder, encoding="utf-8")
    made = build_table(datasets_from_file(config, DatasetDefaults()))
    assert len(made) == 4 and [subset.tags is None for subset in made.subsets] == [False, True]
    for wrong, part in {
        text + subset + "[[datasets.subsets]]\nimage_dir = 'images'\n": "make two",
        text + subset + "is_reg = true\n": "is_reg has no place beside metadata_file",
        text + subset.replace("meta.json", "images"): "metadata_file = images is a folder",
        text + subset.replace("meta.json", "mate.json"): "there is no file",
        text + subset + subset: "have the same metadata_file",
    }.items():
        config.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match=part):
            datasets_from_file(config, DatasetDefaults())


@pytest.mark.parametrize(
    "content, part",
    [
        ({"a": {}, "nowhere": {}}, r"1 of its images .*\(nowhere\).*on_bad_image=skip"),
        ({"nowhere": {}}, "neither in"),
        ({"a": {}, "a.png": {}}, "'a' and 'a.png' are the same image"),
        ({"a": {"caption": 3}}, "'a': expected"),
        ({"a": "cat"}, "'a': expected"),
        (["a"], "got a list"),
        ('{"a": }', "line 1, column 7: this is no JSON"),
    ],
)
def test_what_is_wrong_is_named(images, tmp_path, content, part):
    with pytest.raises(UserError, match=part):
        table(written(tmp_path, content), images)


def test_missing_images_can_be_left_out_and_unknown_values_are_reported(images, tmp_path, caplog):
    path = written(tmp_path, {"a": {"caption": "x", "rating": 1, "train_resolution": [64, 64]}, "nowhere": {}})
    assert table(path, images, "skip").names == ["a.png"]
    assert "nowhere" in caplog.text and "not used: rating" in caplog.text and "train_resolution" not in caplog.text
    with pytest.raises(UserError, match="lists no image that is there"):
        table(written(tmp_path, {"nowhere": {}}), images, "skip")
    with pytest.raises(UserError, match="--in_json=.*no such file"):
        table(tmp_path / "none.json", images)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_jsonl_ends_at_a_line_end_alone(images, tmp_path, mark):
    line = json.dumps({"image_path": "a.png", "caption": f"a red car{mark}outside"}, ensure_ascii=False)
    assert captions(written(tmp_path, f"{line}\r\n{line.replace('a.png', 'b.JPG')}\n", "meta.jsonl"), images) == {
        "a.png": f"a red car{mark}outside",
        "b.JPG": f"a red car{mark}outside",
    }


def test_half_an_emoji_is_left_out_and_reported(images, tmp_path, caplog):
    path = written(tmp_path, '{"a.png": {"caption": "a face \\ud83d"}, "b.JPG": {"caption": "a face \\ud83d\\ude00"}}')
    assert captions(path, images) == {"a.png": "a face ", "b.JPG": "a face \U0001f600"}
    assert "1 caption with half an emoji" in caplog.text and "(a.png first)" in caplog.text


def test_a_caption_of_several_paragraphs_is_reported_once(images, tmp_path, caplog):
    path = written(tmp_path, {"a.png": {"caption": "one\n\ntwo"}, "b.JPG": {"caption": "three\r\nfour"}})
    assert captions(path, images) == {"a.png": "one", "b.JPG": "three"}
    assert caplog.text.count("only the first line is used") == 1
    assert captions(path, images, enable_wildcard=True) == {"a.png": "one\ntwo", "b.JPG": "three\nfour"}


def test_two_datasets_may_share_a_metadata_file(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (128, 64), "blue").save(other / "a.png")
    written(tmp_path, {"a.png": {"caption": "one\ntwo"}})
    parts = [
        f'[[datasets]]\nresolution = 64\nenable_wildcard = {wildcard}\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n'
        f'metadata_file = "{(tmp_path / "meta.json").as_posix()}"\n'
        for wildcard, folder in (("true", images), ("false", other), ("false", images))
    ]
    file = written(tmp_path, "\n".join(parts), "data.toml")
    made = build_table(datasets_from_file(file, DatasetDefaults()))
    assert made.captions == ["one\ntwo", "one", "one"]
    assert made.sizes.tolist() == [[64, 64], [128, 64], [64, 64]]
    assert [made.path(row) for row in range(3)] == [images / "a.png", other / "a.png", images / "a.png"]


def test_deeply_nested_json_is_one_line(images, tmp_path):
    with pytest.raises(UserError, match=r"meta\.json, line 1: .*nested too deeply"):
        captions(written(tmp_path, "[" * 100_000), images)
