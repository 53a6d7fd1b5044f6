from __future__ import annotations

import json

from library.safe_text import as_data, as_unicode, bytes_of, is_unicode, on_terminal


def test_what_is_no_unicode_is_replaced_and_pairs_are_joined():
    assert as_unicode("caf\udce9 \U0001f600") == "caf\ufffd \U0001f600"
    assert as_unicode("\ud83d\ude00") == "\U0001f600" and as_unicode("\ud83d!", instead="") == "!"
    assert is_unicode("ü\U0001f600") and not is_unicode("\ude00")


def test_a_terminal_gets_no_control_characters():
    assert on_terminal("a\x1b[2Jb\x9b\r\n\tü\udce9") == "a\\x1b[2Jb\\x9b\\x0d\n\tü\ufffd"


def test_texts_that_differ_have_checksums_that_differ():
    assert bytes_of("ü") == "ü".encode() and bytes_of("\udce9") != bytes_of("\udce8")


def test_data_for_json_is_unicode_all_through():
    data = as_data({"caf\udce9": ["\udce9", 1, None, ("x",)]})
    assert json.loads(json.dumps(data, ensure_ascii=False).encode()) == {"caf\ufffd": ["\ufffd", 1, None, ["x"]]}
