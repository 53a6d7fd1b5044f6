"""The command line and the config file, both made from options that are declared as fields of typed groups.

A group is a pydantic model whose fields are options, with name, type, default and description. An options class is a pydantic
model whose fields are groups. No other code has the names or checks of options.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from library.errors import Problems, UserError, UserErrors, counted, nearest
from library.files import on_disk
from library.option_files import read_option_tables
from library.option_traits import traits_of
from library.text_values import NEGATIVE, with_plain_minus

MIN_SIMILARITY = 0.7  # of an unknown name to a known one that an error suggests, from 0 to 1
MAX_UNKNOWN_NAMED = 12  # unknown names of a file that get a line each; more would fill the screen


class OptionGroup(BaseModel):
    """Options of one topic. The first line of the docstring is their heading in --help."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    decides_what_is_trained: ClassVar[bool] = True  # else a resumed run may change its options, and metadata does not record them


OptionsT = TypeVar("OptionsT", bound=BaseModel)


def groups_of(options_class: type[BaseModel]) -> dict[str, type[OptionGroup]]:
    """The groups of an options class by name."""
    return {name: typing.cast(type[OptionGroup], field.annotation) for name, field in options_class.model_fields.items()}


def option_names(options_class: type[BaseModel]) -> dict[str, str]:
    """Every option name with the name of its group."""
    return {option: group for group, cls in groups_of(options_class).items() for option in cls.model_fields}


def option_fields(options_class: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every option by name, as it was declared."""
    return {name: field for cls in groups_of(options_class).values() for name, field in cls.model_fields.items()}


def is_flag(field: FieldInfo) -> bool:
    """Whether the option takes no value on the command line."""
    return field.annotation is bool


def is_list(field: FieldInfo) -> bool:
    """Whether the option takes several arguments on the command line."""
    return any(typing.get_origin(t) is list for t in _union_members(field.annotation))


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The allowed values of an option; empty if any value is allowed."""
    return tuple(str(v) for t in _union_members(field.annotation) if typing.get_origin(t) is Literal for v in typing.get_args(t))


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def build_parser(options_class: type[BaseModel], description: str) -> argparse.ArgumentParser:
    """A parser that only collects text; `build` checks types, for the command line and the config file alike."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser._negative_number_matcher = NEGATIVE  # argparse's own takes no -5e-1
    for group_class in groups_of(options_class).values():
        heading = (group_class.__doc__ or group_class.__name__).strip().splitlines()[0]
        section = parser.add_argument_group(heading)
        for name, option in group_class.model_fields.items():
            _add_argument(section, name, option)
    return parser


def _add_argument(section: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    text = (field.description or "").replace("%", "%%")
    if is_flag(field):
        section.add_argument(f"--{name}", action="store_true", help=text)
        return
    default = field.get_default()
    if default not in (None, "", []):
        text += f" (default: {default})"
    choices = choices_of(field)
    metavar = "{" + ",".join(choices) + "}" if choices else name.upper()
    section.add_argument(f"--{name}", nargs="*" if is_list(field) else None, metavar=metavar, help=text)


@dataclass(frozen=True)
class UnsupportedOptions:
    """Options of other trainers that are errors here.

    reasons: the reason of each. harmless: values that a config file may hold, as they ask for nothing. of_front_ends: options of
    graphical front ends, which a config file may hold with any value.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    harmless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    of_front_ends: frozenset[str] = frozenset()

    def is_harmless(self, name: str, value: Any) -> bool:
        """Whether a config file may hold this value: it switches the option off, or is one that front ends write."""
        return value in (False, "", 0, []) or name in self.of_front_ends or value in self.harmless.get(name, ())


def parse(
    options_class: type[OptionsT], arguments: list[str], description: str, unsupported: UnsupportedOptions = UnsupportedOptions()
) -> OptionsT:
    """Options from the command line and, if `--config_file` is given, from that TOML file; the command line wins.

    Raises UserErrors for unknown names (with the most similar known one), unsupported options and wrong values.
    """
    problems = Problems()
    given = parse_command_line(options_class, arguments, description, unsupported, problems)
    values: dict[str, tuple[Any, str]] = {}
    if given.get("config_file", "").strip() and "output_config" not in given:
        path = config_file_path(given["config_file"])
        in_file = read_config_file(options_class, path, unsupported, problems)
        values.update({key: (value, f"'{key}' in {path}") for key, value in in_file.items()})
    values.update({key: (value, f"--{key}") for key, value in given.items()})
    declared = option_fields(options_class)
    for name, (value, where) in list(values.items()):
        if traits_of(declared[name]).path:
            values[name] = (problems.of(_found_paths, value, where, declared[name].get_default()), where)
    return problems.results([problems.of(build, options_class, values)])[0]


def _found_paths(value: Any, where: str, default: Any) -> Any:
    """The value of an option for a path, or for several, each by the name that an existing file has on the disk.

    Scripts write `--vae="$vae"` for a variable that may be empty: the option is not given then. Raises UserError for an empty
    path among others.
    """
    if isinstance(value, str):
        return on_disk(value) if value.strip() else default
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if value and not any(item.strip() for item in value):
            return default
        if not all(item.strip() for item in value):
            raise UserError(f"{where}: one of its paths is empty; take it out")
        return [on_disk(item) for item in value]
    return value


def parse_command_line(
    options_class: type[BaseModel], arguments: list[str], description: str, unsupported: UnsupportedOptions, problems: Problems
) -> dict[str, Any]:
    """The options on the command line as text, by name. Wrong names are added to `problems`; other errors are raised."""
    names = option_names(options_class)
    wrong = []
    for word in arguments:
        if word.startswith("--") and word not in ("--help", "--"):
            name = word[2:].split("=", 1)[0]
            if name in unsupported.reasons:
                wrong.append(f"--{name} is not supported: {unsupported.reasons[name]}")
            elif name not in names:
                wrong.append(unknown_option(f"--{name}", [f"--{known}" for known in names]))
    problems.found += wrong
    parser = build_parser(options_class, description)
    parser.error = _raise_user_error  # type: ignore[method-assign]
    known, rest = parser.parse_known_args([with_plain_minus(word) for word in arguments])
    if rest and not wrong:  # else they are the values of a wrong name
        raise UserError(f"unexpected word '{rest[0]}' on the command line; put values that hold spaces in quotes")
    return vars(known)


def unknown_option(name: str, known: Iterable[str], where: str = "") -> str:
    """The error for an unknown option, with the most similar known one."""
    close = nearest(name, known, cutoff=MIN_SIMILARITY)
    cure = f"did you mean '{close}'?" if close else "no option is like it (--help lists all); take it out"
    return f"unknown option '{name}'{f' in {where}' if where else ''}; {cure}"


def _raise_user_error(message: str) -> typing.NoReturn:
    raise UserError(message.replace("argument ", "", 1))


def config_file_path(name: str) -> Path:
    """The file that `--config_file` names; the suffix `.toml` is optional."""
    for candidate in (Path(on_disk(name)), Path(on_disk(f"{name}.toml"))):
        if candidate.is_file():
            return candidate
    raise UserError(f"--config_file {name}: there is no such file")


def read_config_file(
    options_class: type[BaseModel], path: Path, unsupported: UnsupportedOptions, problems: Problems
) -> dict[str, Any]:
    """Option values of a TOML or JSON file. Tables are flattened; their names do not matter. Errors are added to `problems`.

    Graphical front ends write every option they know. So unsupported options with a harmless value are ignored, and so are
    unknown options that are switched off, unless an option here has a similar name.
    """
    content, unknown_count = read_option_tables(path), 0
    names, fields = option_names(options_class), option_fields(options_class)
    values: dict[str, Any] = {}
    for key, value in _flatten(content):
        if key in values or key == "config_file":
            problems.found.append(f"'{key}' in {path} " + ("stands there twice" if key in values else "cannot name another file"))
        elif key in unsupported.reasons:
            if not unsupported.is_harmless(key, value):
                problems.found.append(f"'{key}' in {path} is not supported: {unsupported.reasons[key]}")
        elif key not in names:
            if value not in (False, "", [], None) or nearest(key, names, cutoff=MIN_SIMILARITY):
                unknown_count += 1
                problems.found += [unknown_option(key, names, where=str(path))] if unknown_count <= MAX_UNKNOWN_NAMED else []
        else:
            option = fields[key]
            if value == "" and option.get_default() is None:
                continue  # front ends write this for an option that is not given
            if isinstance(value, str) and list[str] in _union_members(option.annotation):
                value = [value]
            checked = problems.of(_checked_flag, key, value, is_flag(option), path)
            values |= {} if checked is None else {key: checked}
    if unknown_count > MAX_UNKNOWN_NAMED:
        problems.found.append(f"{path} holds {counted(unknown_count - MAX_UNKNOWN_NAMED, 'more key')} that no option here has")
    return values


def _checked_flag(key: str, value: Any, wanted: bool, path: Path) -> Any:
    """The value of a flag as a bool: true, false, 1 or 0. Raises UserError for other values, and for a bool of another option."""
    if wanted and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if wanted != isinstance(value, bool):
        raise UserError(f"'{key}' in {path}: expected {'true or false' if wanted else 'a value'}, got {value!r}")
    return value


def _flatten(content: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield key, value


def build(options_class: type[OptionsT], values: Mapping[str, tuple[Any, str]]) -> OptionsT:
    """Checked options from raw values; with each value comes the text that names it in an error."""
    names = option_names(options_class)
    raw: dict[str, dict[str, Any]] = {group: {} for group in groups_of(options_class)}
    for option, (value, _) in values.items():
        raw[names[option]][option] = value
    try:
        return options_class(**raw)
    except ValidationError as error:
        raise UserErrors([_describe(problem, values) for problem in error.errors()]) from error


def _describe(problem: Mapping[str, Any], values: Mapping[str, tuple[Any, str]]) -> str:
    option = str(problem["loc"][1]) if len(problem["loc"]) > 1 else str(problem["loc"][-1])
    where = values[option][1] if option in values else f"--{option}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").split(", unable to parse")[0]
    expected = problem["msg"].startswith("Input should be ")
    return f"{where}: expected {message}, got {problem['input']!r}" if expected else f"{where}: {message}"
