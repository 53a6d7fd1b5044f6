"""Reading the dataset file (.toml or .json) into plain tables; a syntax error names file, line and column."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from library.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_config_file(path: Path) -> dict[str, Any]:
    """The top-level table of a dataset file. Raises UserError if it cannot be read or is no TOML or JSON."""
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"--dataset_config {path}: the name must end in .toml or .json")
    text = _read_text(path)
    try:
        tables = tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _toml_error(path, text, str(error)) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: this is no JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path}: the tables are nested too deeply") from error
    if not isinstance(tables, dict):
        raise UserError(f"{path}: the file must hold the tables 'general' and 'datasets', not a {type(tables).__name__}")
    return tables


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"--dataset_config {path}: no such file; looked in {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"--dataset_config {path}: cannot be read: {error.strerror}") from error


def _toml_error(path: Path, text: str, message: str) -> UserError:
    """The parser's message "reason (at line 3, column 5)" as one line, with the cure for the commonest mistake."""
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
