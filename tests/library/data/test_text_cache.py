"""What the text encoders make of captions, computed once: the right rows, never stale ones, none lost by an interruption."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.data.loader import make_loader
from library.data.text_cache import FOLDER, WRITERS, keep_in_memory, keep_on_disk, varying_captions
from library.errors import UserError
from library.models.family import Conditioning

SHAPES = {"context": (77, 4), "pooled": (6,)}


class FakeEncoders:
    """Rows that show their caption; counts what it is asked for."""

    def __init__(self, stop_at=None):
        self.asked, self.stop_at = [], stop_at

    def __call__(self, caption):
        if caption == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(caption)
        mark = float(sum(caption.encode()))
        return Conditioning({name: torch.full((1, *shape), mark, dtype=torch.float16) for name, shape in SHAPES.items()})


def on_disk(folders, encode=None, fingerprint="model 1", **words):
    encode = encode or FakeEncoders()
    return keep_on_disk(folders, encode, fingerprint=fingerprint, shapes=SHAPES, **words), encode


@pytest.fixture
def folders(tmp_path):
    return {caption: tmp_path for caption in ("", "a cat", "dog", "horses")}


def test_each_caption_is_encoded_once_and_alone():
    encode = FakeEncoders()
    texts = keep_in_memory(["dog", "a cat", "", "dog", "horses"], encode)
    assert encode.asked == ["dog", "a cat", "", "horses"]
    states = texts.lookup(["horses", "dog", "dog", ""])
    assert states["context"].shape == (4, 77, 4) and states["pooled"].shape == (4, 6)
    assert states["context"].dtype == torch.float16
    assert states["pooled"][:, 0].tolist() == [sum(b"horses"), sum(b"dog"), sum(b"dog"), 0]
    with pytest.raises(KeyError):
        texts.lookup(["bird"])


def test_files_hold_what_memory_holds_and_are_made_once(folders):
    texts, first = on_disk(folders)
    memory, captions = keep_in_memory(folders, FakeEncoders()), ["dog", "", "dog"]
    for name, rows in texts.lookup(captions).tensors.items():
        assert torch.equal(rows, memory.lookup(captions)[name]) and rows.dtype == torch.float16
    assert len(first.asked) == 4 and on_disk(folders)[1].asked == []


def test_trap_22_a_changed_caption_or_model_never_meets_an_old_file(folders, tmp_path):
    on_disk(folders)
    assert on_disk({**folders, "a black cat": tmp_path})[1].asked == ["a black cat"]
    texts, second = on_disk(folders, fingerprint="model 2")
    assert second.asked == list(folders) and len(list((tmp_path / FOLDER).iterdir())) == 9
    assert texts.lookup(["dog"])["pooled"][0, 0] == sum(b"dog")


def test_damaged_files_are_made_again_and_named_if_they_break_later(folders, tmp_path, caplog):
    texts, _ = on_disk(folders)
    path = texts.paths["dog"]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cached text .*\.safetensors cannot be read"):
        texts.lookup(["dog"])
    texts, again = on_disk(folders)
    assert again.asked == ["dog"] and str(path) in caplog.text and load_file(path)["pooled"].shape == (1, 6)
    path.unlink()
    with pytest.raises(UserError, match="start again"):
        texts.lookup(["dog"])


def test_what_was_encoded_before_an_interruption_is_kept(tmp_path):
    folders = {f"caption {number:02d}": tmp_path for number in range(30)}
    with pytest.raises(KeyboardInterrupt):
        on_disk(folders, FakeEncoders(stop_at="caption 29"))
    assert 1 <= len(on_disk(folders)[1].asked) <= 2 * WRITERS + 2


def test_values_that_are_not_finite_are_never_kept(folders, tmp_path):
    def encode(caption):
        return Conditioning({name: torch.full((1, *shape), float("nan")) for name, shape in SHAPES.items()})

    with pytest.raises(UserError, match="not finite for the caption 'a cat'; use --mixed_precision bf16 or no"):
        on_disk({"a cat": tmp_path}, encode)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / FOLDER).write_text("in the way", encoding="utf-8")
    with pytest.raises(
        UserError, match="--cache_text_encoder_outputs_to_disk cannot write to .*give --cache_text_encoder_outputs"
    ):
        on_disk({"a cat": tmp_path})


def test_processes_share_the_work_and_each_reads_all(folders):
    meet, encoders, found = threading.Barrier(2), [FakeEncoders(), FakeEncoders()], {}

    def work(rank):
        texts, _ = on_disk(folders, encoders[rank], share=(rank, 2), wait=lambda: meet.wait(20))
        found[rank] = texts.lookup(list(folders))["pooled"][:, 0].tolist()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1] == [float(sum(caption.encode())) for caption in folders]
    assert sorted(encoders[0].asked + encoders[1].asked) == sorted(folders) and encoders[0].asked and encoders[1].asked


def dataset_of(folder: Path, **keys) -> TrainingDataset:
    folder.mkdir(exist_ok=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (number * 80, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"\nred {number}, square\nsecond line\n", encoding="utf-8")
    subset = SubsetConfig(image_dir=folder, caption_extension=".txt", **keys)
    return TrainingDataset([DatasetConfig(resolution=64, batch_size=2, subsets=(subset,))], seed=1)


def test_trap_21_fixed_parts_of_captions_are_encoded_too(tmp_path):
    dataset = dataset_of(
        tmp_path / "a", caption_prefix="photo of", caption_suffix="end", secondary_separator="square", caption_separator=";",
        caption_dropout_every_n_epochs=2,
    )  # fmt: skip
    encode = FakeEncoders()
    dataset.texts = keep_in_memory(dataset.possible_captions(), encode)
    assert encode.asked == ["", *(f"photo of red {number}, ; end" for number in range(3))]
    for batch in (dataset[(number, position)] for number in (1, 2) for position in range(2)):
        assert batch.text["pooled"][:, 0].tolist() == [sum(caption.encode()) for caption in batch.captions]
    assert dataset[(2, 0)].captions == ["", ""]


@pytest.mark.parametrize(
    "key, value",
    [("shuffle_caption", True), ("enable_wildcard", True), ("caption_tag_dropout_rate", 0.1), ("token_warmup_step", 5.0)],
)
def test_trap_20_what_makes_captions_vary_is_named_with_its_subset(tmp_path, key, value):
    (problem,) = varying_captions(dataset_of(tmp_path / "a", **{key: value}).table)
    assert problem.startswith(f"{key} of the subset {tmp_path / 'a'} changes captions") and f"take out {key}" in problem
    assert not list(varying_captions(dataset_of(tmp_path / "a", caption_dropout_rate=0.5).table))


@pytest.mark.parametrize("disk", [False, True])
def test_cached_texts_reach_spawned_workers(tmp_path, disk):
    """As on Windows and macOS."""
    dataset = dataset_of(tmp_path / "a")
    variants = dataset.possible_captions()
    dataset.texts = on_disk(variants)[0] if disk else keep_in_memory(variants, FakeEncoders())
    loader = make_loader(dataset, num_workers=1)
    loader.loader.multiprocessing_context = "spawn"
    for batch in loader.epoch(1):
        assert batch.text["pooled"][:, 0].tolist() == [sum(caption.encode()) for caption in batch.captions]
        assert not batch.tokens
