from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files import (
    atomic_write,
    legacy_hash_of_file,
    read_safetensors_header,
    sha256_of_file,
    write_text,
)


def test_atomic_write_replaces_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old\n")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old\n" and os.listdir(path.parent) == ["a.txt"]
    write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()


@pytest.mark.skipif(sys.platform == "win32", reason="rights of another kind")
def test_atomic_write_gives_the_usual_rights(tmp_path):
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"), atomic_write(tmp_path / "file" / "a.txt") as temporary:
        temporary.write_text("x")


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(100.0)}, path, {"k": "v"})
    return path


def test_header_of_a_whole_file(whole):
    header = read_safetensors_header(whole)
    assert header["a"]["shape"] == [100] and header["__metadata__"] == {"k": "v"}


@pytest.mark.parametrize("cut", [1, 350, 10_000])
def test_a_cut_file_is_named(whole, cut):
    whole.write_bytes(whole.read_bytes()[:-cut])
    with pytest.raises(UserError, match="a.safetensors"):
        read_safetensors_header(whole)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"<html>not a model at all</html>" * 9, b"\x10" + b"\0" * 7 + b"[1,2,3]         "]
)
def test_foreign_content_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.safetensors"):
        read_safetensors_header(path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("shape", 1.5), ("shape", ["100"]), ("shape", [-100]), ("shape", None), ("dtype", 4), ("dtype", []),
        ("data_offsets", [400]), ("data_offsets", [0, "400"]), ("data_offsets", [400, 0]), ("data_offsets", 400),
    ],
)  # fmt: skip
def test_a_header_that_describes_a_tensor_oddly_names_it(whole, key, value):
    with_header(whole, lambda header: header["a"].update({key: value}))
    with pytest.raises(UserError, match="a.safetensors is damaged: .* tensor a; fetch it again"):
        read_safetensors_header(whole)


@pytest.mark.parametrize("value", [5, "text", ["a"], {"a": 1}])
def test_metadata_that_is_no_table_of_texts_is_named(whole, value):
    with_header(whole, lambda header: header.update(__metadata__=value))
    with pytest.raises(UserError, match="a.safetensors"):
        read_safetensors_header(whole)


def test_metadata_that_is_null_is_none(whole):
    with_header(whole, lambda header: header.update(__metadata__=None))
    assert "__metadata__" not in read_safetensors_header(whole)


def with_header(path: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON of a .safetensors file's header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_hashes(tmp_path):
    path = tmp_path / "big"
    content = bytes(range(256)) * 4400
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()
    assert legacy_hash_of_file(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
