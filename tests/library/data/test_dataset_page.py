from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.data.dataset_page import MAX_CAPTIONS, write_dataset_page
from library.data.tokens import CaptionTokenizer
from library.models.clip import load_tokenizer
from library.pages.page import ASSETS


def make(folder: Path, **images: tuple[tuple[int, int], str]) -> Path:
    """Images of a size with a caption; each is another one."""
    folder.mkdir(parents=True)
    for name, (size, caption) in images.items():
        pixels = np.random.RandomState(zlib.crc32(name.encode())).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def dataset_of(*subsets: SubsetConfig, **keys) -> TrainingDataset:
    configs = [DatasetConfig(resolution=64, subsets=subsets, **keys)]
    return TrainingDataset(configs, seed=1, tokenizer=CaptionTokenizer([load_tokenizer()]))


def subset(folder: Path, **keys) -> SubsetConfig:
    return SubsetConfig(image_dir=folder, caption_extension=".txt", **keys)


def written(dataset: TrainingDataset, path: Path) -> dict:
    write_dataset_page(dataset, path)
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def rows_of(page: dict) -> dict[str, dict]:
    return {row["file"].removesuffix(".png"): row for row in page["rows"]}


def test_images_and_captions_are_those_of_the_batches(tmp_path):
    """What lies beside the page is what the loader gives in the first epochs, to the pixel."""
    folder = make(tmp_path / "a", one=((90, 70), "cat, red, big, old"), two=((64, 64), "dog, blue, small, young"))
    dataset = dataset_of(subset(folder, shuffle_caption=True, flip_aug=True, random_crop=True), batch_size=2)
    page = written(dataset, tmp_path / "page.html")
    assert page["subsets"][0]["varies"] == ["flip_aug", "random_crop", "shuffle_caption"] and page["subsets"][0]["link"] == "a"
    for row in page["rows"]:
        path, uses = str(folder / row["file"]), []
        for epoch in (1, 2, 3):
            batch = dataset[(epoch, 0)]
            uses.append((batch.captions[batch.paths.index(path)], batch.images[batch.paths.index(path)]))
        assert [text for text, _, _ in row["captions"]] == [caption for caption, _ in uses] and len(uses) == MAX_CAPTIONS
        with Image.open(tmp_path / page["folder"] / row["image"]) as image:
            assert np.array_equal(np.asarray(image), np.rint((uses[0][1].permute(1, 2, 0).numpy() + 1) * 127.5))
    assert len({text for row in page["rows"] for text, _, _ in row["captions"]}) > 2


def test_a_caption_that_does_not_change_is_there_once(tmp_path):
    (row,) = written(dataset_of(subset(make(tmp_path / "a", one=((64, 64), "cat")), num_repeats=5)), tmp_path / "p.html")["rows"]
    assert row["captions"] == [["cat", 1, 3]] and row["repeats"] == 5 and row["problems"] == []


def test_what_is_cut_off_begins_behind_the_last_whole_word_that_fits(tmp_path):
    text = "\N{GRINNING FACE} " + ", ".join(f"unbelievable thing {number}" for number in range(40))
    dataset = dataset_of(subset(make(tmp_path / "a", one=((64, 64), text))))
    (row,) = written(dataset, tmp_path / "p.html")["rows"]
    ((caption, count, read),) = row["captions"]
    assert caption == text and count > 75 and ["too_long", [count, 75]] in row["problems"]
    kept = text.encode("utf-16-le")[: 2 * read].decode("utf-16-le")  # JavaScript counts so
    assert dataset.tokenizer.count(kept) <= 75 < dataset.tokenizer.count(text[: len(kept) + 14])
    batch = dataset[(1, 0)]
    assert dataset.tokenizer.readable(batch.tokens["ids"][0])[: dataset.tokenizer.count(kept)] == dataset.tokenizer.readable(
        dataset.tokenizer([kept])["ids"][0]
    )


def test_what_is_wrong_is_found(tmp_path):
    folder = make(
        tmp_path / "a", good=((64, 64), "x"), small=((30, 30), "x"), wide=((160, 64), "x"), silent=((64, 64), ""),
        twin_a=((64, 64), "x"), twin_b=((64, 64), "x"), broken=((64, 64), "x"),
    )  # fmt: skip
    (folder / "twin_b.png").write_bytes((folder / "twin_a.png").read_bytes())
    content = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    rows = rows_of(written(dataset_of(subset(folder)), tmp_path / "p.html"))
    found = {name: [kind for kind, _ in row["problems"]] for name, row in rows.items()}
    assert found == {
        "good": [], "small": ["enlarged"], "wide": ["cut_away"], "silent": ["no_caption"], "twin_a": ["duplicate"],
        "twin_b": ["duplicate"], "broken": ["unreadable"],
    }  # fmt: skip
    assert rows["small"]["problems"] == [["enlarged", 2.13]] and rows["wide"]["problems"] == [["cut_away", 0.6]]
    assert rows["twin_a"]["problems"] == [["duplicate", ["twin_b.png"]]]
    assert rows["broken"]["image"] is None and "broken.png" in rows["broken"]["problems"][0][1]


def test_images_that_are_not_trained_on_are_shown_as_they_are(tmp_path):
    folder = make(tmp_path / "a", **{f"n{number}": ((64, 64), "cat, red, old") for number in range(4)})
    other = make(tmp_path / "b", **{f"r{number}": ((64, 64), "cat") for number in range(9)})
    dataset = dataset_of(subset(folder, shuffle_caption=True), subset(other, is_reg=True), validation_split=0.25)
    rows = rows_of(written(dataset, tmp_path / "p.html"))
    kinds = [row["problems"][0][0] for row in rows.values() if row["problems"]]
    assert sorted(kinds) == ["held_out"] + ["unused"] * 6
    (held_out,) = (row for row in rows.values() if row["problems"] == [["held_out", None]])
    assert held_out["repeats"] == 0 and held_out["captions"] == [["cat, red, old", 5, 13]] and held_out["image"]


def test_a_mask_lies_over_its_image(tmp_path):
    folder, masks = make(tmp_path / "a", half=((64, 64), "x"), none=((64, 64), "x")), tmp_path / "masks"
    masks.mkdir()
    values = np.zeros((64, 64), np.uint8)
    Image.fromarray(values).save(masks / "none.png")
    values[:, :16] = 255
    Image.fromarray(values).save(masks / "half.png")
    page = written(dataset_of(subset(folder, conditioning_data_dir=masks)), tmp_path / "p.html")
    rows = rows_of(page)
    assert rows["half"]["counts"] == 0.25 and rows["none"]["problems"] == [["nothing_counts", None]]
    with Image.open(tmp_path / page["folder"] / rows["half"]["mask"]) as over:
        alpha = np.asarray(over.convert("RGBA"))[..., 3]
    assert alpha[:, :16].max() == 0 and alpha[:, 16:].min() > 100


def test_images_of_a_larger_dataset_do_not_stay(tmp_path):
    for count in (3, 1):
        folder = make(tmp_path / str(count), **{f"n{number}": ((64, 64), "cat") for number in range(count)})
        page = written(dataset_of(subset(folder)), tmp_path / "p.html")
    assert [path.name for path in (tmp_path / page["folder"]).iterdir()] == ["000000.webp"]


def test_the_page_has_words_for_every_problem():
    words = (ASSETS / "words.js").read_text(encoding="utf-8")
    source = (Path(__file__).parents[3] / "library" / "data" / "dataset_page.py").read_text(encoding="utf-8")
    kinds = set(re.findall(r'(?:yield \[|append\(\[)"(\w+)"', source))
    assert len(kinds) == 9
    for kind in kinds:
        assert words.count(f"is_{kind}: ") == words.count(f"what_{kind}: ") == 2, kind


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_are_counted_as_the_trainer_reads_them(tmp_path, weighted):
    folder = make(tmp_path / "a", one=((64, 64), "(cat:1.2), dog"))
    dataset = TrainingDataset(
        [DatasetConfig(resolution=64, subsets=(subset(folder),))],
        seed=1,
        tokenizer=CaptionTokenizer([load_tokenizer()], weighted=weighted),
    )
    (row,) = written(dataset, tmp_path / "p.html")["rows"]
    assert row["captions"][0][1] == (3 if weighted else 8)
