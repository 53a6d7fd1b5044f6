"""Text and TOML that people write, read with errors that name file, line and column."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from library.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_text(path: Path, option: str) -> str:
    """The content of a UTF-8 file. `option` is named where there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{option} {path}: no such file; looked in {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror}") from error


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The tables of a TOML text. A syntax error names line and column, with the cure for the commonest mistake."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _toml_error(path, text, str(error)) from error
    except RecursionError as error:
        raise UserError(f"{path}: the tables are nested too deeply") from error


def _toml_error(path: Path, text: str, message: str) -> UserError:
    # The parser says "reason (at line 3, column 5)".
    place = re.search(r"\(at (?:line (\d+), column (\d+)|end of document)\)", message)
    reason = message[: place.start()].strip() if place else message
    lines = text.splitlines() or [""]
    number = int(place.group(1)) if place and place.group(1) else len(lines)
    column = place.group(2) if place and place.group(2) else str(len(lines[-1]) + 1)
    line = lines[min(number, len(lines)) - 1]
    hint = ""
    if "\\" in line and '"' in line:
        hint = "; in a path write 'C:\\pictures' with single quotes, or \"C:/pictures\" with forward slashes"
    return UserError(f"{path}, line {number}, column {column}: this is no TOML: {reason}{hint}")
