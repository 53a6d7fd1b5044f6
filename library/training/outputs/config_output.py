"""--output_config: the options of a command as a file for --config_file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from library.errors import UserError
from library.files import write_text
from library.option_traits import traits_of
from library.safe_text import as_unicode, is_unicode

ABOUT_THE_FILE = ("config_file", "output_config")


def changed_options(group: BaseModel) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Name, declaration and value of each option of a group that differs from its default, but for those about config files."""
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if name not in ABOUT_THE_FILE and value != field.get_default():
            yield name, field, value


def toml_value(value: Any) -> str:
    """A text, number, truth value or list of these as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if not is_unicode(value):
            raise UserError(f"--output_config: TOML cannot hold {as_unicode(value)}, which is no UTF-8; rename it")
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(part) for part in value)}]"
    return repr(value)


def options_as_toml(options: BaseModel) -> str:
    """Every option that differs from its default, in a table for each group; secrets are left out."""
    tables = []
    for name, group in options:
        given = {option: value for option, field, value in changed_options(group) if not traits_of(field).secret}
        if given:
            tables.append("\n".join([f"[{name}]", *(f"{option} = {toml_value(value)}" for option, value in given.items())]))
    return "\n\n".join(tables) + "\n"


def write_config(options: BaseModel, config_file: str | None) -> Path:
    """Write these options where --config_file says. Raises UserError if it names nothing, or a file that is there already."""
    if not config_file:
        raise UserError("--output_config needs --config_file: the file to write")
    path = Path(config_file)
    path = path if path.suffix == ".toml" else path.with_name(path.name + ".toml")
    if path.exists():
        raise UserError(f"--output_config: {path} is there already and is left as it is; give another --config_file")
    write_text(path, options_as_toml(options))
    return path
