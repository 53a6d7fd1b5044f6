"""Read the dataset file (.toml or .json) into plain tables; a syntax error names file, line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.errors import UserError
from library.text_files import check_texts, parse_json, parse_toml, read_text


def read_config_file(path: Path) -> dict[str, Any]:
    """The top-level table of a dataset file. Raises UserError if it cannot be read or is neither TOML nor JSON."""
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"--dataset_config {path}: the name must end in .toml or .json")
    text = read_text(path, "--dataset_config")
    tables = parse_toml(text, path) if suffix == ".toml" else parse_json(text, path)
    if not isinstance(tables, dict):
        raise UserError(f"{path}: the file must hold the tables 'general' and 'datasets', not a {type(tables).__name__}")
    check_texts(tables, path)
    return tables
