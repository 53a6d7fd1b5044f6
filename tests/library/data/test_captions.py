"""Captions: which file is read, and what each use of an image makes of it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from library.data.captions import (
    caption_candidates,
    caption_is_fixed,
    count_tags,
    possible_captions,
    process_caption,
    read_caption,
)
from library.data.config_keys import SubsetConfig
from library.errors import UserError


def subset(**keys) -> SubsetConfig:
    return SubsetConfig(image_dir="images", **keys)


def process(caption: str, seed: int = 0, epoch: int = 1, step: int = 0, max_train_steps: int = 100, **keys) -> str:
    return process_caption(caption, subset(**keys), random.Random(seed), epoch=epoch, step=step, max_train_steps=max_train_steps)


# Reading


def test_the_file_beside_the_image_is_read(tmp_path):
    (tmp_path / "a.b.txt").write_bytes("\ufeff  ein Bär, grün \r\n".encode())
    assert read_caption(tmp_path / "a.b.png", subset(caption_extension="txt")) == "ein Bär, grün"


def test_without_a_file_class_tokens_are_the_caption(tmp_path):
    assert read_caption(tmp_path / "a.png", subset(class_tokens="sks cat")) == "sks cat"
    assert read_caption(tmp_path / "a.png", subset()) is None


def test_an_empty_file_is_an_empty_caption_and_is_reported(tmp_path, caplog):
    (tmp_path / "a.caption").write_bytes(b" \r\n")
    assert read_caption(tmp_path / "a.png", subset(class_tokens="sks cat")) == ""
    assert str(tmp_path / "a.caption") in caplog.text


def test_the_first_line_counts_and_the_rest_is_reported_once_a_folder(tmp_path, caplog):
    for name in "ab":
        (tmp_path / f"{name}.caption").write_text("\none\ntwo\n", encoding="utf-8")
        assert read_caption(tmp_path / f"{name}.png", subset()) == "one"
    assert caplog.text.count("more than one line") == 1


def test_with_wildcards_all_lines_count(tmp_path):
    (tmp_path / "a.caption").write_text(" one \n\n two\n", encoding="utf-8")
    assert read_caption(tmp_path / "a.png", subset(enable_wildcard=True)) == "one\ntwo"


def test_text_that_is_no_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "a.caption").write_bytes(b"caf\xe9 noir")
    with pytest.raises(UserError, match=r"a\.caption: byte 3 is no UTF-8"):
        read_caption(tmp_path / "a.png", subset())


def test_face_crops_share_the_caption_of_their_image(tmp_path):
    (tmp_path / "me.caption").write_text("a face", encoding="utf-8")
    assert read_caption(tmp_path / "me_10_20_30_40.png", subset()) == "a face"
    (tmp_path / "me_10_20_30_40.caption").write_text("this very face", encoding="utf-8")
    assert read_caption(tmp_path / "me_10_20_30_40.png", subset()) == "this very face"


def test_trap_4_12_underscores_of_folders_do_not_count(tmp_path):
    folder = tmp_path / "a_b_c_d_e"
    folder.mkdir()
    assert caption_candidates(folder / "me.png", ".txt") == [folder / "me.txt"]
    assert caption_candidates(folder / "x_1_2_3_4.png", ".txt") == [folder / "x_1_2_3_4.txt", folder / "x.txt"]
    (tmp_path / "a.caption").write_text("of somebody else", encoding="utf-8")
    assert read_caption(folder / "me.png", subset()) is None


# Processing


def test_nothing_asked_for_changes_nothing():
    assert process("b,a ,  c") == "b,a ,  c"


def test_prefix_and_suffix():
    assert process("a cat", caption_prefix="photo of", caption_suffix="outdoors") == "photo of a cat outdoors"


def test_shuffle_keeps_the_first_pieces():
    seen = {process("a, b, c, d, e", seed, shuffle_caption=True, keep_tokens=2) for seed in range(200)}
    assert seen == {"a, b, " + rest for rest in ("c, d, e", "c, e, d", "d, c, e", "d, e, c", "e, c, d", "e, d, c")}


def test_the_same_generator_gives_the_same_caption_and_the_global_one_is_not_touched():
    random.seed(1)
    state = random.getstate()
    keys = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.5, "caption_dropout_rate": 0.1, "enable_wildcard": True}
    first = [process("a, b, {c|d}, e\nf, g", seed, **keys) for seed in range(20)]
    assert first == [process("a, b, {c|d}, e\nf, g", seed, **keys) for seed in range(20)]
    assert len(set(first)) > 10 and random.getstate() == state


@pytest.mark.parametrize(("separator", "joined"), [(",", "b, c, a"), (";", "b;c;a"), (" | ", "b | c | a"), ("; ", "b; c; a")])
def test_trap_4_11_pieces_are_joined_with_their_separator(separator, joined):
    seen = {process(separator.join("abc"), seed, shuffle_caption=True, caption_separator=separator) for seed in range(50)}
    assert joined in seen and len(seen) == 6


def test_trap_4_11_keep_tokens_separator_goes_also_when_nothing_is_shuffled():
    assert process("a, b ||| c, d", keep_tokens_separator="|||") == "a, b, c, d"
    assert process("a, b", keep_tokens_separator="|||") == "a, b"


def test_keep_tokens_separator_fixes_head_and_tail():
    keys = {"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 1}
    seen = {process("a, b ||| c, d ||| e, f", seed, **keys) for seed in range(50)}
    assert seen == {"a, b, c, d, e, f", "a, b, d, c, e, f"}
    seen = {process("a, b ||| c, d", seed, **keys, caption_tag_dropout_rate=1.0) for seed in range(5)}
    assert seen == {"a, b"}


def test_tag_dropout_rate_and_kept_pieces():
    counts = Counter(
        tag for seed in range(2000) for tag in process("a, b, c", seed, caption_tag_dropout_rate=0.3, keep_tokens=1).split(", ")
    )
    assert counts["a"] == 2000
    assert all(1300 < counts[tag] < 1500 for tag in "bc")
    assert process("a, b", caption_tag_dropout_rate=1.0) == ""


def test_caption_dropout_rate():
    dropped = sum(process("a", seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert 430 < dropped < 570
    assert process("a", caption_prefix="p", caption_dropout_rate=1.0) == ""


def test_trap_4_3_epoch_dropout_takes_whole_epochs_n_2n_and_no_other():
    dropped = [
        epoch
        for epoch in range(1, 10)
        if {process("a", seed, epoch=epoch, caption_dropout_every_n_epochs=3) for seed in range(10)} == {""}
    ]
    kept = [epoch for epoch in range(1, 10) if process("a", epoch=epoch, caption_dropout_every_n_epochs=3) == "a"]
    assert dropped == [3, 6, 9] and kept == [1, 2, 4, 5, 7, 8]


def test_wildcards_take_a_line_and_an_alternative():
    seen = {process("a {red|blue} cat\nthe cat", seed, enable_wildcard=True) for seed in range(50)}
    assert seen == {"a red cat", "a blue cat", "the cat"}
    assert process("{{a|b}}", enable_wildcard=True) == "{a|b}"
    assert process("{one|two}") == "{one|two}"


def test_prefix_reaches_every_line():
    assert {process("a\nb", seed, enable_wildcard=True, caption_prefix="x") for seed in range(20)} == {"x a", "x b"}


@pytest.mark.parametrize(("step", "pieces"), [(0, 1), (2, 1), (3, 2), (5, 3), (9, 4), (10, 5), (50, 5)])
def test_tags_warm_up(step, pieces):
    """floor(step (n - min) / W) + min of n = 5 pieces with W = 10."""
    assert process("a, b, c, d, e", step=step, token_warmup_step=10) == ", ".join("abcde"[:pieces])


def test_a_warm_up_below_one_is_a_share_of_all_steps():
    assert process("a, b, c, d", step=24, max_train_steps=100, token_warmup_step=0.25) == "a, b, c"
    assert process("a, b, c, d", step=25, max_train_steps=100, token_warmup_step=0.25) == "a, b, c, d"
    assert process("a, b", step=0, token_warmup_step=10, token_warmup_min=5) == "a, b"


def test_secondary_separator_comes_last():
    seen = {process("red;;;hat, cat", seed, shuffle_caption=True, secondary_separator=";;;") for seed in range(20)}
    assert seen == {"red,hat, cat", "cat, red,hat"}


def test_blank_pieces_are_left_out():
    assert process("a,, b,", shuffle_caption=True, keep_tokens=2) == "a, b"


# What may be cached


@pytest.mark.parametrize(
    ("keys", "variants"),
    [
        ({}, ("a, b",)),
        ({"caption_prefix": "x"}, ("x a, b",)),
        ({"keep_tokens": 1, "secondary_separator": ";;"}, ("a, b",)),
        ({"caption_dropout_rate": 0.5}, ("a, b", "")),
        ({"caption_dropout_every_n_epochs": 2}, ("a, b", "")),
        ({"shuffle_caption": True}, None),
        ({"caption_tag_dropout_rate": 0.1}, None),
        ({"token_warmup_step": 10}, None),
        ({"enable_wildcard": True}, None),
    ],
)
def test_variants_of_a_caption(keys, variants):
    assert possible_captions("a, b", subset(**keys)) == variants
    assert caption_is_fixed(subset(**keys)) == (variants is not None and len(variants) == 1)
    if variants:
        seen = {process("a, b", seed, epoch, **keys) for seed in range(30) for epoch in (1, 2)}
        assert seen == set(variants)


def test_tags_are_counted_once_a_caption_file():
    assert count_tags(["A cat, Red ,", "red, dog", "x\ny, red"]) == {"a cat": 1, "red": 3, "dog": 1, "x": 1, "y": 1}


def test_captions_work_with_names_of_any_kind(tmp_path):
    name = Path("图 片 ü.png")
    (tmp_path / "图 片 ü.caption").write_text("画", encoding="utf-8")
    assert read_caption(tmp_path / name, subset()) == "画"


# Letters that other programs leave in captions


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_separators_that_are_no_line_ends_cut_no_caption(tmp_path, mark):
    (tmp_path / "a.txt").write_text(f"a red car{mark}parked outside", encoding="utf-8")
    assert read_caption(tmp_path / "a.png", subset(caption_extension=".txt")) == f"a red car{mark}parked outside"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf_16_caption_is_read_with_and_without_a_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("red car".encode(encoding))
    assert read_caption(tmp_path / "a.png", subset(caption_extension=".txt")) == "red car"


@pytest.mark.parametrize(
    "caption, wanted",
    [
        ("{red|{light|dark} blue} car", {"red car", "light blue car", "dark blue car"}),
        ("{red|{light|dark}} car", {"red car", "light car", "dark car"}),
        ("{{a|b}|c} car", {"a car", "b car", "c car"}),
        ("{{{a|b}|c}|{d|e}}", {"a", "b", "c", "d", "e"}),
        ("{{braces}} {a|b}", {"{braces} a", "{braces} b"}),
        ("{a|{{b}}}", {"a", "{b}"}),
        ("{a|b", {"{a|b"}),
    ],
)
def test_alternatives_within_alternatives(caption, wanted):
    assert {process(caption, seed=seed, enable_wildcard=True) for seed in range(100)} == wanted
