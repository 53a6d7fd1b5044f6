"""Files with the prompts of previews while training (--sample_prompts): text, .toml or .json."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.diffusion.samplers import check_sampler
from library.errors import UserError, unknown
from library.generation.prompts.inline import OPTIONS, parse_line, read_value
from library.generation.prompts.spec import PromptSpec
from library.text_files import lines_of, parse_json, parse_toml, read_text

log = logging.getLogger(__name__)

_BY_KEY = {"prompt": ("prompt", str)} | {option.key: option.of(lenient=True) for option in OPTIONS.values() if option.key}
_IGNORED_KEYS = ("controlnet_image",)


def read_prompt_file(path: str | Path, defaults: PromptSpec) -> list[PromptSpec]:
    """The prompts of a .toml or .json file, or of any other file as text with one prompt a line.

    `defaults` gives what a prompt leaves open. Raises `UserError` naming file, line or key, and option for anything that is not
    understood, and for a file without prompts.
    """
    path = Path(path)
    text = read_text(path, "--sample_prompts")
    ignored: list[str] = []
    readers = {".toml": _from_toml, ".json": _from_json}
    specs = readers.get(path.suffix.lower(), _from_lines)(text, defaults, str(path), ignored)
    if not specs:
        raise UserError(f"prompt file '{path}' holds no prompt; write one prompt a line")
    _log_ignored(ignored, str(path))
    return specs


def _from_line(line: str, defaults: PromptSpec, where: str, ignored: list[str]) -> PromptSpec:
    return replace(defaults, **parse_line(line, where, lenient=True, ignored=ignored))


def _from_lines(text: str, defaults: PromptSpec, path: str, ignored: list[str]) -> list[PromptSpec]:
    return [
        _from_line(line, defaults, f"{path}, line {number}", ignored)
        for number, line in enumerate(lines_of(text), start=1)
        if line.strip() and not line.strip().startswith("#")
    ]


def _from_toml(text: str, defaults: PromptSpec, path: str, ignored: list[str]) -> list[PromptSpec]:
    """Table [prompt] with values common to all, and a list [[prompt.subset]] whose values win. Without the list: one prompt."""
    document = parse_toml(text, Path(path))
    for key in document.keys() - {"prompt"}:
        raise unknown("table or key", key, ["prompt"], path)
    table = document.get("prompt", {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: 'prompt' must be a table; begin it with the line [prompt]")
    common = dict(table)
    subsets = common.pop("subset", [{}] if common else [])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: 'prompt.subset' must be a list of tables; begin each with the line [[prompt.subset]]")
    tables = [f"[[prompt.subset]] {number}" for number in range(1, len(subsets) + 1)] if "subset" in table else ["[prompt]"]
    return [
        _from_table({**common, **subset}, defaults, f"{path}, {name}", ignored)
        for subset, name in zip(subsets, tables, strict=False)
    ]


def _from_json(text: str, defaults: PromptSpec, path: str, ignored: list[str]) -> list[PromptSpec]:
    """A list of objects with the keys of the .toml file, or of lines in the text syntax."""
    items = parse_json(text, Path(path))
    if not isinstance(items, list):
        raise UserError(f"prompt file '{path}' must be a list; put its prompts between [ and ]")
    specs = []
    for number, item in enumerate(items, start=1):
        where = f"{path}, item {number}"
        if isinstance(item, str):
            specs.append(_from_line(item, defaults, where, ignored))
        elif isinstance(item, dict):
            specs.append(_from_table(item, defaults, where, ignored))
        else:
            raise UserError(f"{where}: must be a text or an object with the key 'prompt'")
    return specs


def _from_table(table: dict[str, Any], defaults: PromptSpec, where: str, ignored: list[str]) -> PromptSpec:
    if "prompt" not in table:
        raise UserError(f"{where}: has no prompt; add the key 'prompt'")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in _IGNORED_KEYS:
            ignored.append(key)
            continue
        if key not in _BY_KEY:
            raise unknown("key", key, (*_BY_KEY, *_IGNORED_KEYS), where)
        field, read = _BY_KEY[key]
        text_wanted = read in (str, check_sampler)
        if isinstance(value, bool) or not isinstance(value, str if text_wanted else (int, float)):
            raise UserError(f"{where}: key '{key}' must be {'text' if text_wanted else 'a number'}, not {value!r}")
        values[field] = value if read is str else read_value(str(value), read, f"'{key}'", where)
    return replace(defaults, **values)


def _log_ignored(ignored: list[str], where: str) -> None:
    if ignored:
        log.warning(f"{where}: for other model families or ControlNet, ignored: {', '.join(dict.fromkeys(ignored))}")
