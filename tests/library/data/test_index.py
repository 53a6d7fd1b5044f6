"""Finding images, and errors about those that cannot be used."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from library.data.images import own_mark
from library.data.index import index_folders
from library.errors import UserError


def save(path, width=20, height=10, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(width * height).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_images_are_found_in_any_case_sorted_and_with_sizes(tmp_path):
    save(tmp_path / "b.PNG", 11, 12)
    save(tmp_path / "a.Jpg", 13, 14)
    save(tmp_path / "c d é.webp", 15, 16)
    save(tmp_path / "e.JPEG", 17, 18)
    save(tmp_path / "f.bmp", 19, 20)
    save(tmp_path / "._a.png"), save(tmp_path / "deeper" / "g.png")
    (tmp_path / "a.txt").write_text("caption", encoding="utf-8")
    images = index_folders([tmp_path])[tmp_path]
    assert images.names == ["a.Jpg", "b.PNG", "c d é.webp", "e.JPEG", "f.bmp"]
    assert images.sizes.tolist() == [[13, 14], [11, 12], [15, 16], [17, 18], [19, 20]]
    assert images.path(1) == tmp_path / "b.PNG" and len(images) == 5


def test_bad_images_are_refused_in_one_error(tmp_path):
    save(tmp_path / "good.png")
    for number in range(14):
        (tmp_path / f"bad {number:02d}.png").write_bytes(b"" if number % 2 else b"not an image")
    with pytest.raises(UserError) as error:
        index_folders([tmp_path])
    text = str(error.value)
    assert "14 images cannot be used" in text and "and 4 more" in text and "--on_bad_image=skip" in text
    assert "bad 01.png (the file is empty (0 bytes))" in text and "bad 09.png" in text and "bad 10.png" not in text


def test_bad_images_are_skipped_and_named(tmp_path, caplog):
    save(tmp_path / "good.png")
    cut_off = save(tmp_path / "cut.png", 64, 64)
    cut_off.write_bytes(cut_off.read_bytes()[:5000])
    (tmp_path / "empty.png").write_bytes(b"")
    # A file cut off behind its header is not noticed without decoding it ...
    (tmp_path / "empty.png").unlink()
    assert len(index_folders([tmp_path])[tmp_path]) == 2
    (tmp_path / "empty.png").write_bytes(b"")
    # ... which "skip" does.
    with caplog.at_level(logging.WARNING):
        images = index_folders([tmp_path], "skip")[tmp_path]
    assert images.names == ["good.png"] and images.sizes.tolist() == [[20, 10]]
    assert "cut.png: cut off or damaged" in caplog.text and "empty.png: the file is empty" in caplog.text
    assert "2 images skipped" in caplog.text


def test_several_folders_keep_their_own(tmp_path):
    save(tmp_path / "one" / "a.png", 8, 9), save(tmp_path / "two" / "a.png", 10, 11), save(tmp_path / "two" / "b.png", 12, 13)
    one, two = tmp_path / "one", tmp_path / "two"
    index = index_folders([two, one, two])
    assert index[one].sizes.tolist() == [[8, 9]] and index[two].sizes.tolist() == [[10, 11], [12, 13]]


def test_what_training_drew_is_no_data_and_is_named(tmp_path, caplog):
    save(tmp_path / "a.png")
    save(tmp_path / "mine-loss.png", pnginfo=own_mark("loss plot"))
    for on_bad_image in ("refuse", "skip"):
        caplog.clear()
        assert index_folders([tmp_path], on_bad_image)[tmp_path].names == ["a.png"]
        assert "left out 1 plot or sample that training drew" in caplog.text
