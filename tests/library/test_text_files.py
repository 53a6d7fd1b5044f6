from __future__ import annotations

import codecs
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.text_files import check_texts, decoded, lines_of, parse_json, parse_toml, read_text

CUTS_NOTHING = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_lines_end_at_line_ends_alone():
    assert lines_of(f"a{CUTS_NOTHING}b\r\nc\rd\n\ne") == [f"a{CUTS_NOTHING}b", "c", "d", "", "e"]


@pytest.mark.parametrize(
    "content",
    [
        "rotes Auto, grün".encode(),
        codecs.BOM_UTF8 + "rotes Auto, grün".encode(),
        *(mark + "rotes Auto, grün".encode(name) for mark, name in (
            (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
            (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (b"", "utf-16-le"), (b"", "utf-16-be"),
        )),
    ],
)  # fmt: skip
def test_text_is_read_in_any_unicode_encoding(tmp_path, content):
    assert decoded(content) == "rotes Auto, grün"
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt", "--x") == "rotes Auto, grün"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["赤い車, 大きい", "красная машина", "a"])
def test_utf_16_without_a_mark_of_any_letters(text, encoding):
    assert decoded(text.encode(encoding)) == text


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea", b"\x00\x00\x00\x01", b"a\0\0", b"a red\0car, outdoors"])
def test_what_is_no_text_names_the_byte(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt: byte \d+ is no UTF-8"):
        read_text(tmp_path / "a.txt", "--x")


def test_an_empty_file_is_an_empty_text():
    assert decoded(b"") == "" and lines_of("") == [""]


@pytest.mark.parametrize(
    "text, line, words",
    [
        ('{\n"a": }', None, "line 2, column 6: this is no JSON"),
        ('{"a": }', 7, "line 7, column 7: this is no JSON"),
        ("[" * 100_000, None, "line 1: the lists and tables are nested too deeply"),
        ('{"a":[' * 100 + "]}" * 100, 3, "line 3: the lists and tables are nested too deeply"),
        ("1" * 10_000, 3, "line 3: this is no JSON that can be read"),
        ('{"x": {"a.png": 1, "b": 2, "a.png": 1}}', None, "'a.png' stands twice"),
        ('{"a": 1, "a": 2}', 4, "line 4: 'a' stands twice"),
    ],
)
def test_wrong_json_is_reported_with_file_and_line(text, line, words):
    if text.isdecimal() and not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this Python reads numbers of any length")
    with pytest.raises(UserError, match=f"^meta.json[,:] {words}"):
        parse_json(text, Path("meta.json"), line)


@pytest.mark.parametrize("text", ["\ud83d", "a\0b"])
@pytest.mark.parametrize("where", ["value", "list", "key", "inner"])
def test_a_text_that_no_path_can_be_is_named_with_its_key(text, where):
    tables = {
        "value": {"image_dir": text}, "list": {"x": [1, text]}, "key": {text: 1},
        "inner": {"general": {"x": {"image_dir": text}}},
    }[where]  # fmt: skip
    with pytest.raises(UserError, match="c.json: .* holds NUL or half an emoji; write the text anew"):
        check_texts(tables, Path("c.json"))
    check_texts({"image_dir": "\udce9t\udce9", "x": ["😀", 1, None]}, Path("c.json"))  # a path that is no UTF-8 is one


def test_several_marks_at_the_beginning_are_no_text():
    assert decoded(codecs.BOM_UTF8 * 2 + b"a") == decoded(codecs.BOM_UTF16_LE * 2 + b"a\0") == "a"


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a." * 500 + "b = 1", "a." * 100_000 + "b = 1"])
def test_toml_that_is_nested_too_deeply(text):
    with pytest.raises(UserError, match="^a.toml: the tables are nested too deeply$"):
        parse_toml(text, Path("a.toml"))
    assert parse_toml(f'# {"." * 2000}\na = "{"." * 2000}"\n{"b." * 50}c = [[[1]]]', Path("a.toml"))["a"] == "." * 2000
