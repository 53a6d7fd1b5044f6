"""Files of options for --config_file: TOML, or JSON with options by name. Files of other kinds are recognised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.text_files import check_texts, parse_json, parse_toml, read_text


def read_option_tables(path: Path) -> dict[str, Any]:
    """The tables of a file of options. Raises UserError, saying what the file is, for a file of another kind."""
    text = read_text(path, "--config_file")
    content = parse_json(text, path) if text.lstrip().startswith("{") else parse_toml(text, path)
    check_texts(content, path)
    _refuse_other_files(content, path)
    return content


def _refuse_other_files(content: Mapping[str, Any], path: Path) -> None:
    if "LoRA_type" in content or "max_resolution" in content:
        raise UserError(
            f"{path} is the JSON file that the kohya_ss GUI saves for itself, with other names and units; give the "
            "config_lora-*.toml that it writes into the output folder, or the words of its button 'Print training command'"
        )
    if isinstance(content.get("datasets"), list):
        raise UserError(f"{path} is a dataset file; give it as --dataset_config={path}")
    if any(isinstance(table, dict) and isinstance(table.get("args"), dict) for table in content.values()):
        raise UserError(
            f"{path} is a file of LoRA_Easy_Training_Scripts; write the keys of its 'args' tables at the top level, its "
            'network_args and optimizer_args as lists (["algo=locon"]), and its subsets into a file for --dataset_config'
        )
