"""Files of weights, written: streamed, checked, and read by others."""

from __future__ import annotations

import itertools
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.formats import tensor_file, tensor_output
from library.formats.low_rank import is_finite
from library.formats.tensor_file import open_tensors
from library.formats.tensor_output import batches_of, parts_of, rows_in, save_pickled, write_weights

TENSORS = {
    "b.weight": torch.randn(3, 5),
    "a.half": torch.randn(4, 3).half(),
    "c.bf16": torch.randn(7).bfloat16(),
    "ids": torch.arange(5),
    "flag": torch.tensor(True),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
}


def write(path, tensors=TENSORS, metadata=None, **numbers):
    plan = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    write_weights(path, plan, lambda name, rows: rows_in(tensors[name], rows), metadata or {}, numbers)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_safetensors_written_here_is_read_by_the_library(tmp_path):
    path = tmp_path / "new folder" / "ä.safetensors"
    write(path, metadata={"ss_x": "1", "title": "日本"})
    assert same(load_file(path), TENSORS)
    with open_tensors(path) as file:
        assert file.metadata == {"ss_x": "1", "title": "日本"}
        assert same({name: file.view(name) for name in file.shapes}, TENSORS)
    assert [entry.name for entry in path.parent.iterdir()] == ["ä.safetensors"]


def test_the_layout_is_that_of_the_library(tmp_path):
    """Aligned, largest dtype first; the same bytes of data if the names are in order."""
    tensors = {name: TENSORS[name] for name in sorted(TENSORS) if name not in ("flag",)}
    write(tmp_path / "ours.safetensors", tensors)
    with open_tensors(tmp_path / "ours.safetensors") as file:
        sizes = [file.dtypes[name].itemsize for name in file.shapes]
        assert sizes == sorted(sizes, reverse=True) and min(file._begins.values()) % 8 == 0


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_pickled_files(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(tensor_file, "WINDOW", 10)
    path = tmp_path / f"model{suffix}"
    write(path, epoch=3, global_step=70)
    assert same(torch.load(path, weights_only=True)["state_dict"], TENSORS)
    with open_tensors(path) as file:
        assert file.counters == {"epoch": 3, "global_step": 70}
        assert same({name: file.view(name) for name in file.shapes}, TENSORS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_pickled_files_are_archives_as_torch_writes_them(tmp_path, monkeypatch):
    """In parts of a few numbers: checksums of the archive fit, and the numbers lie where they can be mapped."""
    monkeypatch.setattr(tensor_output, "PART", 4)
    tensors = {name: value for name, value in TENSORS.items() if name != "empty"}
    write(tmp_path / "x.ckpt", tensors)
    assert same(torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=True)["state_dict"], tensors)
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None
    places = torch.load(tmp_path / "x.ckpt", weights_only=True, map_location="meta")["state_dict"].values()
    assert {entry.partition("/")[2].split("/")[0] for entry in archive.namelist()} == {"data.pkl", "version", "data"}
    assert all(value.untyped_storage()._checkpoint_offset % tensor_output.ALIGNMENT == 0 for value in places)
    with pytest.raises(UserError, match="x is torch.float8_e4m3fn, which .ckpt has no place for"):
        write(tmp_path / "y.ckpt", {"x": torch.ones(2).to(torch.float8_e4m3fn)})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_nan_is_never_written_and_the_old_file_stays(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="bad holds NaN or infinity"):
        write(path, {"good": torch.ones(3), "bad": torch.tensor([1.0, float("inf")])})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(tensor_output, "checksum", lambda value: next(numbers))
    with pytest.raises(UserError, match="did not read back"):
        write(tmp_path / "x.safetensors", {"x": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_flush_that_failed_is_not_forgotten(tmp_path, monkeypatch):
    """The system tells of a full disk once; later flushes go well."""
    flush, calls = os.fsync, itertools.count()

    def failing_once(descriptor: int) -> None:
        if next(calls) == 0:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", failing_once)
    monkeypatch.setattr(tensor_output, "FLUSH_AFTER", 16)
    with pytest.raises(UserError, match="cannot write .* No space left"):
        write(tmp_path / "x.safetensors", {f"{number}": torch.ones(9) for number in range(9)})
    assert not list(tmp_path.iterdir())


def test_finite():
    assert is_finite(torch.full((4,), 3e38)) and is_finite(torch.full((100,), 60000.0).half()) and is_finite(torch.arange(3))
    assert not is_finite(torch.tensor([1.0, float("nan")])) and not is_finite(torch.tensor([float("-inf")]).bfloat16())


def test_a_file_in_the_way_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "x.safetensors", {"x": torch.ones(1)})


def test_a_lora_in_ckpt_is_the_dictionary_of_its_tensors_alone(tmp_path):
    """As the A1111 web UI's safe loader wants it: an archive of data.pkl, the version and the tensors, no others."""
    turned = torch.arange(12.0).view(3, 4).T
    save_pickled({**TENSORS, "turned": turned}, tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt", weights_only=True), {**TENSORS, "turned": turned})
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = [f"archive/data/{number}" for number in range(len(TENSORS) + 1)]
        assert archive.namelist() == ["archive/data.pkl", "archive/version", *records]


def test_small_tensors_are_worked_on_together(monkeypatch):
    """A thread's task for each of the hundreds of small tensors of a LoRA took longer than the work."""
    monkeypatch.setattr(tensor_output, "PART", 12)
    shapes = {"empty": (0, 4), "a": (2, 3), "number": (), "b": (5,), "large": (5, 6), "wide": (2, 20), "c": (3,)}
    batches = batches_of(shapes)
    assert [part for batch in batches for part in batch] == [(name, rows) for name in shapes for rows in parts_of(shapes[name])]
    assert [[name for name, _ in batch] for batch in batches] == [
        ["empty", "a", "number", "b"], ["large"], ["large"], ["large"], ["wide"], ["wide"], ["c"],
    ]  # fmt: skip
    assert batches_of({}) == []
