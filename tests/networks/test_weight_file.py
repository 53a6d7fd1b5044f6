"""Files of weights: streamed, checked, and hostile ones refused."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import weight_file, weight_output
from networks.low_rank import is_finite
from networks.weight_file import open_weights
from networks.weight_output import output_path, rows_in, write_weights

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
    with open_weights(path) as file:
        assert file.metadata == {"ss_x": "1", "title": "日本"}
        assert same({name: file.view(name) for name in file.shapes}, TENSORS)
    assert [entry.name for entry in path.parent.iterdir()] == ["ä.safetensors"]


def test_the_layout_is_that_of_the_library(tmp_path):
    """Aligned, largest dtype first; the same bytes of data if the names are in order."""
    tensors = {name: TENSORS[name] for name in sorted(TENSORS) if name not in ("flag",)}
    write(tmp_path / "ours.safetensors", tensors)
    with open_weights(tmp_path / "ours.safetensors") as file:
        sizes = [file.dtypes[name].itemsize for name in file.shapes]
        assert sizes == sorted(sizes, reverse=True) and file._start % 8 == 0


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_pickled_files(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(weight_file, "WINDOW", 10)
    path = tmp_path / f"model{suffix}"
    write(path, epoch=3, global_step=70)
    assert same(torch.load(path, weights_only=True)["state_dict"], TENSORS)
    with open_weights(path) as file:
        assert file.numbers == {"epoch": 3, "global_step": 70}
        assert same({name: file.view(name) for name in file.shapes}, TENSORS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_pickled_files_are_archives_as_torch_writes_them(tmp_path, monkeypatch):
    """In parts of a few numbers: checksums of the archive fit, and the numbers lie where they can be mapped."""
    monkeypatch.setattr(weight_output, "PART", 4)
    tensors = {name: value for name, value in TENSORS.items() if name != "empty"}
    write(tmp_path / "x.ckpt", tensors)
    assert same(torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=True)["state_dict"], tensors)
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None
    places = torch.load(tmp_path / "x.ckpt", weights_only=True, map_location="meta")["state_dict"].values()
    assert all(value.untyped_storage()._checkpoint_offset % weight_output.ALIGNMENT == 0 for value in places)
    with pytest.raises(ValueError, match="x is torch.float8_e4m3fn, which .ckpt has no place for"):
        write(tmp_path / "y.ckpt", {"x": torch.ones(2).to(torch.float8_e4m3fn)})


def test_tensors_that_share_memory_or_are_turned_are_read_right(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole, "b": whole.T, "c": whole[1:, 1]}, tmp_path / "x.ckpt")
    with open_weights(tmp_path / "x.ckpt") as file:
        assert same({name: file.view(name) for name in file.shapes}, {"a": whole, "b": whole.T, "c": whole[1:, 1]})
        assert all(file.view(name).is_contiguous() for name in file.shapes)
        file.view("a").zero_()  # changes nothing in the file
    with open_weights(tmp_path / "x.ckpt") as file:
        kept = file.view("a")
    assert torch.equal(kept, whole)


def test_a_file_of_the_original_kind_opens(tmp_path, monkeypatch):
    """Lightning leaves classes in its checkpoints that are not installed here."""
    package = "pytorch_lightning.callbacks.model_checkpoint"
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", package):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        kind = type("ModelCheckpoint", (), {"__module__": package})
        sys.modules[package].ModelCheckpoint = kind
        torch.save({"state_dict": {"x": torch.ones(2)}, "callbacks": {kind: {"n": 1}}, "epoch": 1}, tmp_path / "a.ckpt")
    with open_weights(tmp_path / "a.ckpt") as file:
        assert list(file.shapes) == ["x"] and file.numbers == {"epoch": 1}


class Evil:
    def __reduce__(self):
        return os.system, ("echo code ran > EVIL",)


def test_trap_1_17_code_in_a_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "zip.ckpt")
    for name in ("plain.ckpt", "zip.ckpt"):
        with pytest.raises(ValueError, match="code in it would have run"):
            open_weights(tmp_path / name)
    assert not (tmp_path / "EVIL").exists()


def saved(folder, content) -> bytes:
    torch.save(content, folder / "saved")
    return (folder / "saved").read_bytes()


def hostile(folder):
    """Files that are no weights, by name, with what the error says."""
    good = folder / "good.safetensors"
    write(good)
    content = good.read_bytes()
    header = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    torch.save({"x": torch.ones(100)}, folder / "good.ckpt")
    files = {
        "empty.safetensors": (b"", "is empty"),
        "cut.safetensors": (content[:-3], "cut off"),
        "cut_header.safetensors": (content[:40], "cut off"),
        "short.safetensors": (content[:5], "cut off"),
        "text.safetensors": (b"<html>not found</html>", "no file of weights"),
        "wrong_shape.safetensors": (len(text).to_bytes(8, "little") + text + bytes(8), "does not fit its shape"),
        "no_json.safetensors": ((8).to_bytes(8, "little") + b"{aaaaaaa", "not readable"),
        "list.safetensors": ((8).to_bytes(8, "little") + b"[1,2,3] ", "not readable"),
        "renamed.safetensors": ((folder / "good.ckpt").read_bytes(), "wrong name"),
        "cut.ckpt": ((folder / "good.ckpt").read_bytes()[:300], "cut off"),
        "no_dict.ckpt": (saved(folder, [1, 2]), "no model or LoRA"),
        "no_tensors.ckpt": (saved(folder, {"a": 1}), "no tensors"),
        "empty.ckpt": (b"", "is empty"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: message for name, (_, message) in files.items()}


def test_hostile_files_are_refused_by_name(tmp_path):
    for name, message in hostile(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            open_weights(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="is a folder"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        open_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_nan_is_never_written_and_the_old_file_stays(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="bad holds NaN or infinity"):
        write(path, {"good": torch.ones(3), "bad": torch.tensor([1.0, float("inf")])})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(weight_output, "checksum", lambda value: next(numbers))
    with pytest.raises(ValueError, match="did not read back"):
        write(tmp_path / "x.safetensors", {"x": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_flush_that_failed_is_not_forgotten(tmp_path, monkeypatch):
    """The system tells of a full disk once; later flushes go well."""
    flush, calls = os.fsync, itertools.count()

    def failing_once(descriptor: int) -> None:
        if next(calls) == 0:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(weight_output.os, "fsync", failing_once)
    monkeypatch.setattr(weight_output, "FLUSH_AFTER", 16)
    with pytest.raises(ValueError, match="cannot write .* No space left"):
        write(tmp_path / "x.safetensors", {f"{number}": torch.ones(9) for number in range(9)})
    assert not list(tmp_path.iterdir())


def test_finite():
    assert is_finite(torch.full((4,), 3e38)) and is_finite(torch.full((100,), 60000.0).half()) and is_finite(torch.arange(3))
    assert not is_finite(torch.tensor([1.0, float("nan")])) and not is_finite(torch.tensor([float("-inf")]).bfloat16())


def test_output_names(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1)}, source)
    with pytest.raises(ValueError, match="overwrite an input"):
        output_path(tmp_path / "." / "a.safetensors", [source])
    with pytest.raises(ValueError, match="overwrite an input"):
        output_path(tmp_path / "to be made" / ".." / "a.safetensors", [source])
    with pytest.raises(ValueError, match="suffix decides"):
        output_path(tmp_path / "a.zip", [])
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        output_path(tmp_path / "d.safetensors", [])
    assert output_path(str(tmp_path / "b.pt"), [source]) == tmp_path / "b.pt"


def test_a_file_in_the_way_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write"):
        write(tmp_path / "file" / "x.safetensors", {"x": torch.ones(1)})
