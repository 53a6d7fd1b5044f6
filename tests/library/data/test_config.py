"""Dataset files: which value wins, and the error for every mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from library.data.config import UNSUPPORTED, datasets_from_file, datasets_from_folders, datasets_from_metadata
from library.data.config_keys import DATASET_KEYS, SHARED_KEYS, DatasetConfig, DatasetDefaults, SubsetConfig
from library.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory with two folders of (stub) images, `cats` and `dogs`."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    return tmp_path


def read(text: str, name: str = "data.toml", **defaults) -> list[DatasetConfig]:
    Path(name).write_text(text, encoding="utf-8")
    return datasets_from_file(Path(name), DatasetDefaults(**defaults))


def error_of(text: str, **defaults) -> str:
    with pytest.raises(UserError) as caught:
        read(text, **defaults)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SMALL = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'cats'\n"


def test_a_small_file_gets_every_default(here):
    (dataset,) = read(SMALL)
    assert dataset.resolution == (512, 512)
    assert (dataset.batch_size, dataset.min_bucket_reso, dataset.max_bucket_reso) == (1, 256, 1024)
    assert (dataset.bucket_reso_steps, dataset.enable_bucket, dataset.bucket_no_upscale) == (64, False, False)
    (subset,) = dataset.subsets
    assert subset == SubsetConfig(image_dir=Path("cats"))
    assert (subset.caption_extension, subset.num_repeats, subset.keep_tokens) == (".caption", 1, 0)
    assert (subset.caption_separator, subset.token_warmup_min, subset.class_tokens) == (",", 1, None)


def test_the_first_level_that_has_a_value_wins(here):
    text = """
        [general]
        keep_tokens = 2
        batch_size = 2
        flip_aug = false
        [[datasets]]
        resolution = [640, 448]
        keep_tokens = 3
        [[datasets.subsets]]
        image_dir = "cats"
        keep_tokens = 4
        [[datasets.subsets]]
        image_dir = "dogs"
        is_reg = true
        [[datasets]]
        resolution = 256
        batch_size = 8
        [[datasets.subsets]]
        image_dir = "cats"
    """
    first, second = read(text, keep_tokens=1, flip_aug=True, num_repeats=5, resolution="768", shuffle_caption=True)
    assert [s.keep_tokens for s in first.subsets + second.subsets] == [4, 3, 2]
    assert [d.batch_size for d in (first, second)] == [2, 8]
    assert [d.resolution for d in (first, second)] == [(640, 448), (256, 256)]
    assert [s.is_reg for s in first.subsets] == [False, True]
    for subset in first.subsets + second.subsets:
        assert not subset.flip_aug, "false in the file beats a flag"
        assert subset.shuffle_caption and subset.num_repeats == 5, "the command line beats defaults"


def test_subset_interpolation_beats_the_datasets(here):
    (dataset,) = read(
        SMALL + "resize_interpolation = 'box'\n[[datasets.subsets]]\nimage_dir = 'dogs'", resize_interpolation="area"
    )
    assert [s.resize_interpolation for s in dataset.subsets] == ["box", "area"]
    assert dataset.resize_interpolation == "area"


def test_every_key_is_accepted_at_every_level_it_belongs_to(here):
    values = {
        "resolution": 512, "batch_size": 2, "enable_bucket": True, "min_bucket_reso": 128, "max_bucket_reso": 1024,
        "bucket_reso_steps": 8, "bucket_no_upscale": False, "class_tokens": "cat", "caption_extension": "txt", "num_repeats": 2,
        "shuffle_caption": True, "keep_tokens": 1, "caption_separator": ";", "keep_tokens_separator": "|||",
        "secondary_separator": ";;;", "enable_wildcard": True, "caption_prefix": "a", "caption_suffix": "b",
        "caption_dropout_rate": 1, "caption_dropout_every_n_epochs": 2, "caption_tag_dropout_rate": 0.5, "token_warmup_min": 2,
        "token_warmup_step": 0.5, "color_aug": True, "flip_aug": True, "random_crop": True, "resize_interpolation": "lanczos",
        "validation_split": 0.5, "validation_seed": 3, "alpha_mask": True,
    }  # fmt: skip
    assert set(values) | {"face_crop_aug_range"} == set(DATASET_KEYS + SHARED_KEYS)
    for level in ("general", "dataset", "subset"):
        own = values if level != "subset" else {k: v for k, v in values.items() if k in SHARED_KEYS}
        subset = {"image_dir": "cats", **(own if level == "subset" else {})}
        dataset = {"resolution": 256, "subsets": [subset], **(own if level == "dataset" else {})}
        (result,) = read(json.dumps({"general": own if level == "general" else {}, "datasets": [dataset]}), "data.json")
        for key, value in own.items():
            holder = result if key in DATASET_KEYS and level != "subset" else result.subsets[0]
            expected = {"caption_extension": ".txt", "resolution": (512, 512) if level == "dataset" else (256, 256)}
            assert getattr(holder, key) == expected.get(key, value), (level, key)


def test_whole_numbers_stand_for_fractions(here):
    """The common checker refuses 1 where it wants 1.0."""
    (dataset,) = read(SMALL + "caption_dropout_rate = 1\nface_crop_aug_range = [2, 4]\ntoken_warmup_step = 100")
    assert dataset.subsets[0].caption_dropout_rate == 1.0
    assert dataset.subsets[0].face_crop_aug_range == (2.0, 4.0)


def test_json_null_means_not_given(here):
    text = '{"datasets": [{"resolution": 512, "subsets": [{"image_dir": "cats", "keep_tokens": null}]}]}'
    (dataset,) = read(text, "data.json", keep_tokens=3)
    assert dataset.subsets[0].keep_tokens == 3


def test_a_byte_order_mark_is_no_syntax_error(here):
    Path("bom.toml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert datasets_from_file(Path("bom.toml"), DatasetDefaults())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[general]\nshuffel_caption = true\n" + SMALL, ["data.toml, [general]", "'shuffel_caption'", "'shuffle_caption'"]),
        (SMALL + "num_repeat = 2", ["[[datasets]] 1, [[datasets.subsets]] 1", "'num_repeat'", "'num_repeats'"]),
        (SMALL + "bacth_size = 2", ["'bacth_size'", "'batch_size'"]),
        (SMALL + "resolution = 512", ["[[datasets.subsets]] 1", "'resolution' does not belong", "[general] or [[datasets]]"]),
        ("[general]\nis_reg = true\n" + SMALL, ["[general]", "'is_reg' does not belong", "[[datasets.subsets]]"]),
        ("[[datasets]]\nimage_dir = 'cats'\n[[datasets.subsets]]\nimage_dir='cats'", ["[[datasets]] 1", "'image_dir'"]),
        ("resolution = 512\n" + SMALL, ["top level", "'resolution'", "[general] or [[datasets]]"]),
        ("[[dataset]]\nresolution = 512", ["top level", "'dataset'", "'datasets'"]),
        ("[[datasets]]\n[[datasets.subset]]\nimage_dir = 'cats'", ["[[datasets]] 1", "'subset'", "did you mean 'subsets'"]),
        ("[[datasets]]\nresolution = 512\nflip_augg = true", ["[[datasets]] 1", "'flip_augg'", "'flip_aug'"]),
        ("[[subsets]]\nimage_dir = 'cats'", ["top level", "'subsets'", "[[datasets.subsets]]"]),
        (SMALL + "prior_loss_weight = 1.0", ["--prior_loss_weight"]),
        ("[general]\ncaption_extention = '.txt'\n" + SMALL, ["'caption_extention'", "'caption_extension'"]),
    ],
)
def test_a_wrong_key_names_file_place_and_the_nearest_key(here, text, parts):
    message = error_of(text)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_trap_4_19_known_keys_that_are_not_built_are_refused_by_name(here, key):
    message = error_of(f"[general]\n{key} = 2.0\n" + SMALL)
    assert f"the key '{key}' is not supported: " in message


def test_refused_keys_may_ask_for_nothing(here):
    read("[general]\ncache_info = false\nnetwork_multiplier = 1.0\ncustom_attributes = {}\n" + SMALL)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("num_repeats = '3'", ['num_repeats = "3"', "whole number"]),
        ("num_repeats = 1.5", ["num_repeats = 1.5", "whole number"]),
        ("num_repeats = 0", ["num_repeats = 0", "at least 1"]),
        ("num_repeats = 99999999999999999999", ["num_repeats = 99999999999999999999", "at most 1,000,000"]),
        ("keep_tokens = 99999999999999999999", ["keep_tokens", "at most 1,000,000"]),
        ("token_warmup_step = inf", ["token_warmup_step", "finite"]),
        ("face_crop_aug_range = [2.0, inf]", ["face_crop_aug_range", "two numbers"]),
        ("num_repeats = true", ["num_repeats = true", "whole number"]),
        ("shuffle_caption = 1", ["shuffle_caption = 1", "true or false"]),
        ("shuffle_caption = 'yes'", ['shuffle_caption = "yes"', "true or false"]),
        ("caption_dropout_rate = 1.5", ["1.5", "at most 1"]),
        ("caption_dropout_rate = nan", ["caption_dropout_rate"]),
        ("class_tokens = 5", ["class_tokens = 5", "text in quotes"]),
        ('caption_prefix = "a\\nb"', ["caption_prefix", "a text of one line"]),
        ('caption_suffix = "a\\r"', ["caption_suffix", "a text of one line"]),
        ('class_tokens = "a\\nb"', ["class_tokens", "a text of one line"]),
        ("metadata_file = '~nobody-of-this-name/x.json'", ["metadata_file", "the folder of a user of this machine"]),
        ("resize_interpolation = 'cube'", ['"cube"', "'lanczos'"]),
        ("face_crop_aug_range = [4.0, 2.0]", ["face_crop_aug_range", "smaller one first"]),
        ("face_crop_aug_range = 2.0", ["[2.0, 4.0]"]),
        ("caption_separator = ''", ["caption_separator", "at least one character"]),
        ("caption_extension = '.'", ['".txt"']),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_expected(here, line, parts):
    message = error_of(SMALL + line)
    assert all(part in message for part in ["data.toml", "[[datasets.subsets]] 1", *parts]), message


@pytest.mark.parametrize("value", ["'512'", "'512,512'", "[512]", "[1, 2, 3]", "512.0", "true", "[512, '512']", "7", "99999"])
def test_a_wrong_resolution_shows_the_right_form(here, value):
    message = error_of(f"[[datasets]]\nresolution = {value}\n[[datasets.subsets]]\nimage_dir='cats'")
    assert "resolution = " in message and ("512 or [640, 448]" in message or "sides of 8 to 16,384 pixels" in message)


EVERYTHING = """
    [general]
    flipaug = true
    [[datasets]]
    batch_size = 0
    num_repeats = "2"
    [[datasets.subsets]]
    image_dir = "birds"
    [[datasets.subsets]]
    image_dir = "cats"
    keep_tokens = -1
    [[datasets]]
    [[datasets.subsets]]
    num_repeats = 2
    [[datasets]]
    resolution = 512
    [[datasets.subsets]]
    image_dir = "none"
"""


def test_all_that_is_wrong_in_a_file_is_reported_at_once(here):
    (here / "none").mkdir()
    with pytest.raises(UserError) as caught:
        read(EVERYTHING)
    wanted = [
        "unknown key 'flipaug'", "[[datasets]] 1: batch_size = 0", '[[datasets]] 1: num_repeats = "2"',
        "1, [[datasets.subsets]] 1: image_dir = birds: there is no folder", "1, [[datasets.subsets]] 2: keep_tokens = -1",
        "2, [[datasets.subsets]] 1: image_dir is missing", "3, [[datasets.subsets]] 1: no image",
    ]  # fmt: skip
    found = caught.value.problems
    assert [part in text for part, text in zip(wanted, found, strict=True)] == [True] * len(wanted), found
    with pytest.raises(UserError) as caught:
        read("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'birds'\n")
    assert ["birds" in text or "resolution is missing" in text for text in caught.value.problems] == [True, True]


def test_all_folders_without_images_are_reported_at_once(here):
    with pytest.raises(UserError) as caught:
        datasets_from_folders(here / "birds", here / "fish", DatasetDefaults())
    assert [part in text for part, text in zip(("birds", "fish", "resolution"), caught.value.problems, strict=True)] == [True] * 3
    with pytest.raises(UserError) as caught:
        datasets_from_metadata(here / "a.json", here / "birds", DatasetDefaults())
    assert [part in text for part, text in zip(("a.json", "birds", "resolution"), caught.value.problems, strict=True)] == [
        True
    ] * 3


def test_syntax_error_gives_file_line_and_column_in_one_line(here):
    assert "data.toml, line 3, column" in error_of("[general]\nflip_aug = true\nshuffle_caption = True\n" + SMALL)
    assert "data.toml, line 2, column" in error_of("[general]\nclass_tokens = 'cat")
    with pytest.raises(UserError, match="data.json, line 1, column 2"):
        read("{flip: 1}", "data.json")


@pytest.mark.parametrize("path", [r"C:\data\cats", r"C:\Users\me\cats", r"D:\xyz"])
def test_backslashes_in_double_quotes_are_explained(here, path):
    message = error_of(f'[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "{path}"')
    assert "line 4" in message and "single quotes" in message


def test_backslashes_that_toml_accepts_are_explained_too(here):
    assert "single quotes" in error_of('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "C:\\train\\new"')


def test_a_file_of_another_kind_or_none_is_refused(here):
    with pytest.raises(UserError, match=r"\.toml or \.json"):
        read(SMALL, "data.yaml")
    with pytest.raises(UserError, match="no such file"):
        datasets_from_file(Path("absent.toml"), DatasetDefaults())
    Path("latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UserError, match="latin.toml: byte 5 is no UTF-8"):
        datasets_from_file(Path("latin.toml"), DatasetDefaults())
    with pytest.raises(UserError, match="general"):
        read("[]", "data.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no [[datasets]]"]),
        ("[[datasets]]\nresolution = 512", ["[[datasets]] 1", "no [[datasets.subsets]]"]),
        ("[datasets]\nresolution = 512", ["double brackets"]),
        ("[[general]]\nflip_aug = true", ["single brackets"]),
        ("[[datasets]]\nresolution = 512\n[datasets.subsets]\nimage_dir = 'cats'", ["double brackets"]),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 1", ["image_dir is missing"]),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'", ["resolution is missing", "--resolution=512"]),
        (SMALL + "is_reg = true", ["regularisation"]),
        (SMALL.replace("cats", "birds"), ["birds", "no folder"]),
        (SMALL.replace("cats", "data.toml"), ["is a file"]),
        (SMALL + "[[datasets.subsets]]\nimage_dir = 'cats/../cats'", ["1 and 2", "same image_dir"]),
        (SMALL + "[[datasets.subsets]]\nimage_dir = '.'", ["no image", ".png", "its subfolder cats"]),
    ],
)
def test_what_is_missing_or_double_is_reported_with_the_cure(here, text, parts):
    message = error_of(text)
    assert all(part in message for part in ["data.toml", *parts]), message


def test_the_same_folder_in_two_datasets_is_fine(here):
    assert len(read(SMALL + SMALL.replace("512", "768"))) == 2


def test_relative_folders_are_found_from_here_or_from_the_file(here):
    (here / "sets" / "birds").mkdir(parents=True)
    (here / "sets" / "birds" / "1.png").touch()
    text = SMALL + "[[datasets.subsets]]\nimage_dir = 'birds'"
    (dataset,) = read(text, "sets/data.toml")
    assert [s.image_dir for s in dataset.subsets] == [Path("cats"), Path("sets/birds")]


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ("resolution = 128\nenable_bucket = true", "below min_bucket_reso 256"),
        ("resolution = [512, 1280]\nenable_bucket = true", "above max_bucket_reso 1024"),
        ("resolution = 512\nenable_bucket = true\nmin_bucket_reso = 2048", "above max_bucket_reso"),
        ("resolution = 512\nbucket_reso_steps = 20", "multiple of 8"),
        ("resolution = 512\nenable_bucket = true\nface_crop_aug_range = [2, 4]", "without buckets"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(here, keys, part):
    assert part in error_of(f"[[datasets]]\n{keys}\n[[datasets.subsets]]\nimage_dir = 'cats'")


def test_bounds_that_choose_nothing_refuse_nothing(here):
    read(SMALL.replace("512", "128"))
    read(SMALL.replace("512", "128\nenable_bucket = true\nbucket_no_upscale = true"))


def test_trap_4_15_bucket_steps_may_be_any_multiple_of_8(here):
    for step in (8, 16, 32, 40, 64):
        (dataset,) = read(SMALL.replace("512", f"512\nenable_bucket = true\nbucket_reso_steps = {step}"))
        assert dataset.bucket_reso_steps == step


def test_bounds_are_rounded_outwards_to_the_step_and_reported(here, caplog):
    text = SMALL.replace("512", "512\nenable_bucket = true\nmin_bucket_reso = 300\nmax_bucket_reso = 1000")
    (dataset,) = read(text)
    assert dataset.bucket_bounds == (256, 1024)
    assert "256 and 1024 are used" in caplog.text


def test_bucket_keys_without_effect_are_reported(here, caplog):
    read(SMALL.replace("512", "512\nbucket_no_upscale = true"))
    assert "bucket_no_upscale has no effect without enable_bucket" in caplog.text


def test_captions_of_another_extension_are_pointed_out(here, caplog):
    (here / "cats" / "1.txt").touch()
    read(SMALL)
    assert "--caption_extension=.txt" in caplog.text
    caplog.clear()
    read(SMALL + "caption_extension = '.txt'")
    assert not caplog.text


def test_images_of_unread_kinds_are_named(here, caplog):
    (here / "cats" / "2.heic").touch()
    read(SMALL)
    assert "images left out: 2.heic; convert" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("resolution", "wide", "--resolution=wide: expected 512 or 640,448"),
        ("resolution", "1,2,3", "--resolution=1,2,3: expected 512 or 640,448"),
        ("resolution", "7", "--resolution=7: expected sides of 8 to 16,384 pixels"),
        ("resolution", "512,99999", "--resolution=512,99999: expected sides of 8 to 16,384 pixels"),
        ("face_crop_aug_range", "0,2", "expected two numbers above 0, the smaller one first, such as 2.0,4.0"),
        ("batch_size", 10**20, "--train_batch_size=100000000000000000000: expected at most 1,000,000"),
        ("face_crop_aug_range", "2", "--face_crop_aug_range=2: expected two numbers"),
        ("batch_size", 0, "--train_batch_size=0: expected at least 1"),
        ("num_repeats", 0, "--dataset_repeats=0: expected at least 1"),
        ("caption_dropout_rate", 2.0, "--caption_dropout_rate=2.0: expected at most 1"),
    ],
)
def test_wrong_values_of_the_command_line_name_the_option(key, value, part):
    with pytest.raises(UserError) as caught:
        DatasetDefaults(**{key: value})
    assert part in str(caught.value)


def test_the_command_line_gives_pairs_as_text():
    defaults = DatasetDefaults(resolution="640,448", face_crop_aug_range="4.0,2.0")
    assert (defaults.resolution, defaults.face_crop_aug_range) == ((640, 448), (2.0, 4.0))
    assert DatasetDefaults(resolution="512").resolution == (512, 512)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_broken_links_are_listed_so_that_they_can_be_named(here):
    from library.data.folders import list_images

    (here / "cats" / "gone.png").symlink_to(here / "nowhere.png")
    assert [p.name for p in list_images(here / "cats")] == ["1.png", "gone.png"]


def test_configs_are_frozen_and_pickle(here):
    import pickle

    (dataset,) = read(SMALL)
    assert pickle.loads(pickle.dumps(dataset)) == dataset
    with pytest.raises(ValueError):
        dataset.batch_size = 3
