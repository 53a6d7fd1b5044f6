"""Files of weights: every format gives the same tensors, everything else one line that names file and reason."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.formats.tensor_file import load_pickled, open_tensors, read_safetensors

TENSORS = {
    "a.weight": torch.randn(3, 4),
    "b": torch.randn(5).half(),
    "c": torch.randn(2, 2).bfloat16(),
    "ids": torch.arange(7)[None],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "double": torch.randn(2, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
}


def write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(TENSORS, path, metadata={"format": "pt"})
    elif kind == "wrapped":
        torch.save({"state_dict": TENSORS, "epoch": 3, "global_step": 110000, "note": "text"}, path)
    elif kind == "plain":
        torch.save(TENSORS, path)
    elif kind == "legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("safetensors", ".safetensors"), ("safetensors", ".ckpt"), ("wrapped", ".ckpt"), ("plain", ".pt"), ("legacy", ".bin")],
)
def test_every_format(tmp_path, kind, suffix):
    path = write(tmp_path / f"näme mit spaces{suffix}", kind)
    with open_tensors(path) as file:
        assert file.shapes == {name: tuple(value.shape) for name, value in TENSORS.items()}
        assert file.dtypes == {name: value.dtype for name, value in TENSORS.items()}
        read = {name: file.read(name) for name in file.shapes}
        assert same({name: file.view(name) for name in file.shapes}, TENSORS)
        assert file.counters == ({"epoch": 3, "global_step": 110000} if kind == "wrapped" else {})
    path.unlink()  # nothing holds the file: the tensors have memory of their own
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)


def test_only_floating_point_takes_the_dtype(tmp_path):
    with open_tensors(write(tmp_path / "a.safetensors", "safetensors")) as file:
        assert file.read("a.weight", torch.float16).dtype == torch.float16
        assert torch.equal(file.read("c", torch.float32), TENSORS["c"].float())
        assert file.read("ids", torch.float16).dtype == torch.int64


def test_tensors_can_be_changed_without_changing_the_file(tmp_path):
    for kind in ("safetensors", "plain"):
        path = write(tmp_path / kind, kind)
        before = path.read_bytes()
        with open_tensors(path) as file:
            file.read("a.weight").zero_()
            assert torch.equal(file.read("a.weight"), TENSORS["a.weight"])
        assert path.read_bytes() == before


def test_tensors_that_share_memory_or_are_turned_are_read_right(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole, "b": whole.T, "c": whole[1:, 1]}, tmp_path / "x.ckpt")
    with open_tensors(tmp_path / "x.ckpt") as file:
        assert same({name: file.view(name) for name in file.shapes}, {"a": whole, "b": whole.T, "c": whole[1:, 1]})
        assert all(file.view(name).is_contiguous() for name in file.shapes)
        file.view("a").zero_()  # changes nothing in the file
    with open_tensors(tmp_path / "x.ckpt") as file:
        kept = file.view("a")
    assert torch.equal(kept, whole)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def refused(path: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught, open_tensors(path) as file:
        for name in file.shapes:
            file.read(name)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n\n  <html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "JPEG image"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"GGUF\x03\0\0\0", "GGUF file.*; get the .safetensors file"),
        (b'{"error": "not found"}', "a JSON file"),
        (b"Rar!\x1a\x07\x01\0" + bytes(50), "a RAR archive; unpack it"),
        (b"%PDF-1.4", "a PDF document; give a file of weights instead"),
        (b"hello, this is text", "no file of weights"),
        (bytes(1000), "no file of weights"),
        (b"PK\x03\x04" + bytes(100), "no checkpoint|wrong name"),
        (b"\x80\x02}q\x00.", "no checkpoint|wrong name"),
        (b"\x80\x04garbage", "no checkpoint|not opened|wrong name"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_foreign_files(tmp_path, content, reason, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refused(path, reason)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".zip"])
def test_an_archive_of_files_is_named(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lora/mine.safetensors", "x")
    refused(path, "a zip archive of files, not of tensors; unpack it")


@pytest.mark.parametrize("content, what", [("string_to_param", "a textual inversion embedding"), ("params_ema", "an upscaler")])
def test_pickled_files_of_other_programs_are_named(tmp_path, content, what):
    torch.save({content: {"*": torch.zeros(2, 768)}, "name": "x"}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", f"a.pt is {what}.*, no model or LoRA")


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no file")
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize("kind", ["safetensors", "plain", "legacy"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_files(tmp_path, kind, share):
    whole = write(tmp_path / "whole", kind).read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "cut off|damaged|no checkpoint|no file of weights|not readable")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 16]},
        {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "data_offsets": [0, 16]},
    ],
)
def test_lying_headers(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(path, "damaged|unknown dtype")


def test_tensors_beyond_the_end_of_a_pickled_file(tmp_path, monkeypatch):
    """A record that is shorter than the pickle says: the archive itself is whole."""
    torch.save({"x": torch.ones(1000)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(tmp_path / "short.ckpt", "w") as short:
        for name in whole.namelist():
            short.writestr(name, whole.read(name)[:100] if "/data/" in name else whole.read(name))
    refused(tmp_path / "short.ckpt", "beyond its end|cut off")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}])
def test_pickled_files_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "no model or LoRA")


class Bomb:
    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("protocol", ["zip", "legacy", "raw"])
def test_trap_1_17_code_in_a_checkpoint_never_runs(tmp_path, protocol):
    target, path = tmp_path / "was-run", tmp_path / "model.ckpt"
    content = {"state_dict": {"x": torch.zeros(2)}, "bomb": Bomb(str(target))}
    if protocol == "raw":
        path.write_bytes(pickle.dumps({"bomb": Bomb(str(target))}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    refused(path, "not opened|no checkpoint")
    assert not target.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_pickles_of_later_protocols_are_read_or_named(tmp_path, protocol, kind, recwarn):
    path, content = tmp_path / "model.ckpt", {"state_dict": {"x": torch.ones(2)}, "names": ["a", "b"], "epoch": 7}
    if kind == "raw":
        path.write_bytes(pickle.dumps({"x": [1.0, 2.0], "epoch": 7}, protocol=protocol))
        refused(path, "was not opened: it is pickled with protocol" if protocol > 3 else "no checkpoint")
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
        if protocol > 3:
            return refused(path, f"was not opened: it is pickled with protocol {protocol}, .* save it again")
        with open_tensors(path) as file:
            assert torch.equal(file.read("x"), torch.ones(2)) and file.counters == {"epoch": 7}
    assert not [str(warning.message) for warning in recwarn if "protocol" in str(warning.message)]


def test_an_archive_whose_names_are_no_text_is_named(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"x": torch.zeros(2)}, path)
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")  # the directory's last entry; its flags say that names are UTF-8
    flags = (int.from_bytes(content[start + 8 : start + 10], "little") | 0x800).to_bytes(2, "little")
    path.write_bytes(content[: start + 8] + flags + content[start + 10 : start + 46] + b"\x82" + content[start + 47 :])
    refused(path, "model.ckpt")


def test_code_inside_a_zip_named_safetensors_never_runs(tmp_path):
    target, path = tmp_path / "was-run", tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(str(target)), protocol=2))
        archive.writestr("archive/version", "3\n")
    refused(path, "wrong name; rename it to model.ckpt")
    refused(path.rename(tmp_path / "model.ckpt"), "not opened|no checkpoint")
    assert not target.exists()


def test_records_of_the_training_program_are_harmless(tmp_path, monkeypatch):
    """The original SD 1.4 file holds Lightning's ModelCheckpoint class and numpy numbers; neither is needed to read it."""
    import numpy

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "model.ckpt"
    record = {module.ModelCheckpoint: {"best_model_score": numpy.float64(0.5)}}
    torch.save({"state_dict": {"x": torch.ones(2)}, "callbacks": record}, path)
    monkeypatch.undo()
    with open_tensors(path) as file:
        assert torch.equal(file.read("x"), torch.ones(2))


def test_pickled_tensors(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.safetensors.ckpt")
    assert torch.equal(load_pickled(tmp_path / "a.safetensors.ckpt")["a"], torch.ones(3))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list"):
        load_pickled(tmp_path / "list.pt")
    with pytest.raises(UserError, match="missing.pt"):
        load_pickled(tmp_path / "missing.pt")
    whole = (tmp_path / "a.safetensors.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.ckpt is cut off"):
        load_pickled(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_under_any_wrapper_also_in_each_other(tmp_path, wrapper, legacy):
    content = {wrapper: {"state_dict": {"a": torch.arange(6.0).view(2, 3)}}, "epoch": 2, "optimizer": {"b": torch.ones(2)}}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    with open_tensors(tmp_path / "m.ckpt") as file:
        assert list(file.shapes) == ["a"] and torch.equal(file.read("a"), content[wrapper]["state_dict"]["a"])


def test_numbers_and_arrays_of_numpy_are_data(tmp_path):
    """Beside the tensors, and in place of some."""
    arrays = {f"weight.{kind}": numpy.arange(6).astype(kind).reshape(2, 3) for kind in ("f2", "f4", "f8", "i8", "u1", "?")}
    turned = numpy.arange(6, dtype="f4").reshape(2, 3).T
    more = {"names": numpy.array(["a", "b"]), "loss": numpy.float32(0.5), "best": numpy.float16(1)}
    counters = {"epoch": numpy.int64(3), "global_step": numpy.int32(40)}
    content = {"model": {"a": torch.ones(2), **arrays, "turned": turned}, **more, **counters}
    torch.save(content, tmp_path / "m.ckpt")
    with open_tensors(tmp_path / "m.ckpt") as file:
        assert set(file.shapes) == {"a", "turned", *arrays} and file.counters == {"epoch": 3, "global_step": 40}
        for name, array in {**arrays, "turned": turned}.items():
            assert file.read(name).numpy().dtype == array.dtype and (file.read(name).numpy() == array).all(), name
            assert torch.equal(file.view(name), file.read(name))


def test_trap_1_17_code_in_an_array_never_runs(tmp_path):
    target = tmp_path / "went-off"
    array = numpy.array([Bomb(str(target))], dtype=object)
    torch.save({"model": {"a": torch.ones(1)}, "log": array}, tmp_path / "m.ckpt")
    with pytest.raises(UserError, match="code in it would have run"):
        open_tensors(tmp_path / "m.ckpt")
    assert not target.exists()


def test_views_are_as_they_were_after_their_memory_was_given_back(tmp_path):
    tensors = {"a": torch.rand(3000), "b": torch.rand(50, 40)}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as file:
        views = {name: file.view(name) for name in tensors}
    assert torch.equal(views["a"], tensors["a"])
    file.windows.forget()
    assert all(torch.equal(views[name], value) for name, value in tensors.items())
    del views
    file.windows.forget()


def test_a_safetensors_file_is_read_whole_also_from_a_folder_that_is_no_utf8(tmp_path, not_utf8):
    path = not_utf8 / "a.safetensors"
    write(tmp_path / "a.safetensors", "safetensors").rename(path)
    read = read_safetensors(path)
    assert {*read} == {*TENSORS}
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in TENSORS.items())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut off or damaged"):
        read_safetensors(path)
    with pytest.raises(UserError, match="cannot read .*b.safetensors: No such file"):
        read_safetensors(not_utf8 / "b.safetensors")
