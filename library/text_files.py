"""Text, TOML and JSON files, read with errors that name file, line and column."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from library.errors import UserError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_DEPTH = 100  # of tables and lists within each other
MAX_DOTS = 1_000  # in a key of TOML, whose reader takes time by their square

_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),  # before UTF-16, whose mark is its beginning
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def lines_of(text: str) -> list[str]:
    """The lines of a text. `splitlines` also cuts at U+2028, U+0085 and six more, which captions and JSON may hold."""
    return re.split("\r\n|\n|\r", text)


def decoded(content: bytes, guess: bool = True) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    guess: recognise UTF-16 without a mark by its NUL bytes. Raises UnicodeDecodeError for anything else.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding).lstrip("\ufeff")  # concatenated files may have several
    text = content.decode(_utf_16_by_nuls(content) if guess and _may_be_utf_16(content) else "utf-8")
    if "\0" in text:
        raise UnicodeDecodeError("utf-8", content, content.index(0), content.index(0) + 1, "NUL stands in no text")
    return text


def _may_be_utf_16(content: bytes) -> bool:
    """Its Latin letters have a NUL each, others another control character, or are no UTF-8; a NUL alone is an accident."""
    nuls = content.count(0)
    if not nuls or nuls * 4 >= len(content):
        return bool(nuls)
    try:
        return bool(re.search("[\x01-\x08\x0b\x0c\x0e-\x1f]", content.decode()))
    except UnicodeDecodeError:
        return True


def _utf_16_by_nuls(content: bytes) -> str:
    """UTF-16 of the byte order that has more NULs as high bytes, which come second in UTF-16-LE."""
    return "utf-16-le" if content[1::2].count(0) >= content[::2].count(0) else "utf-16-be"


def read_text(path: Path, option: str, guess: bool = True) -> str:
    """The content of a text file, see `decoded`. `option` is named in errors about a missing file."""
    try:
        return decoded(path.read_bytes(), guess)
    except FileNotFoundError as error:
        raise UserError(f"{option} {path}: no such file; looked in {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror}") from error


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The tables of a TOML text. A syntax error names line and column; for backslashes in a path it has the cure."""
    too_deep = UserError(f"{path}: the tables are nested too deeply")
    if any(line.partition("=")[0].count(".") > MAX_DOTS for line in lines_of(text) if not line.lstrip().startswith("#")):
        raise too_deep
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _toml_error(path, text, str(error)) from error
    except RecursionError as error:
        raise too_deep from error
    if _is_deep(tables):
        raise too_deep
    return tables


def _is_deep(value: Any) -> bool:
    """Whether lists and tables within each other are more than code that calls itself for each can take."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [value for values in inner for value in values]
        if not level:
            return False
    return True


class DoubleKey(ValueError):
    """A key that a JSON object has twice: readers take the last, and the first would be lost without a word."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise DoubleKey(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return table


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text. Errors name line and column, or a double key. line: the number of the text's line in the file."""
    too_deep = UserError(f"{path}, line {line or 1}: the lists and tables are nested too deeply")
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except DoubleKey as error:
        raise UserError(
            f"{path}{f', line {line}' if line else ''}: '{error}' stands twice in one object; take one out"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line or error.lineno}, column {error.colno}: this is no JSON: {error.msg}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}, line {line or 1}: this is no JSON that can be read: {one_line(error)}") from error
    except RecursionError as error:
        raise too_deep from error
    if _is_deep(value):
        raise too_deep
    return value


def check_texts(value: Any, path: Path, key: str = "") -> None:
    """Raises UserError for a text in a file's tables that no path can hold: JSON and TOML can have NUL and half an emoji."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_texts(name, path, "a key")
            check_texts(inner, path, name)
    elif isinstance(value, list):
        for inner in value:
            check_texts(inner, path, key)
    elif isinstance(value, str):
        try:
            is_text = b"\0" not in value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            is_text = False
        if not is_text:
            raise UserError(f"{path}: {key}: {ascii(value)[:80]} holds NUL or half an emoji; write the text anew")


def _toml_error(path: Path, text: str, message: str) -> UserError:
    # The parser's message is "reason (at line 3, column 5)".
    position = re.search(r"\(at (?:line (\d+), column (\d+)|end of document)\)", message)
    reason = message[: position.start()].strip() if position else message
    lines = lines_of(text)
    number = int(position.group(1)) if position and position.group(1) else len(lines)
    column = position.group(2) if position and position.group(2) else str(len(lines[-1]) + 1)
    line = lines[min(number, len(lines)) - 1]
    hint = ""
    if "\\" in line and '"' in line:
        hint = "; in a path write 'C:\\images' with single quotes, or \"C:/images\" with forward slashes"
    return UserError(f"{path}, line {number}, column {column}: this is no TOML: {reason}{hint}")
