"""`key=value` pairs of --optimizer_args, --lr_scheduler_args, --network_args and --highres_fix_upscaler_args.

`read_pairs` splits words, as they stand on the command line, into keys and texts; `arguments_for` converts the texts to the
types that a function or class expects.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation

from library.errors import UserError, unknown
from library.text_values import depth_of, read_value

SEPARATORS = ",; \t\r\n"  # around pairs
_KEY = re.compile(r"[^\W\d]\w*\s*=(?!=)")


def read_pairs(words: Iterable[str] | None, option: str) -> dict[str, str]:
    """The values as text, by key. A word may hold several pairs, separated by blanks or semicolons.

    A comma belongs to a list: after the last pair one is ignored, between two pairs it is an error.

    >>> read_pairs(["decouple=True weight_decay=0.1", "betas=(0.9, 0.99),"], "--optimizer_args")
    {'decouple': 'True', 'weight_decay': '0.1', 'betas': '(0.9, 0.99)'}

    Raises UserError for a word that is no pair, a key without a value, and a key with two different values.
    """
    pairs: dict[str, str] = {}
    found = list(_pairs_of(_rejoined(words or (), option)))
    for number, pair in enumerate(found, start=1):
        if number < len(found) and pair.rstrip().endswith(","):
            raise UserError(
                f"{option}: a comma stands behind '{pair.rstrip(SEPARATORS)}'; put only a blank between two arguments"
            )
        key, _, value = (part.strip(SEPARATORS) for part in pair.partition("="))
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
        if not value:
            raise UserError(f"{option}: '{key}' has no value; write {key}=value")
        if pairs.setdefault(key, value) != value:
            raise UserError(f"{option}: {key} is given twice, as {pairs[key]} and as {value}; give it once")
    return pairs


def _rejoined(words: Iterable[str], option: str) -> Iterable[str]:
    """The words, each beginning with a key. One that does not is joined to a list that the shell split: `betas=(0.9,` `0.99)`."""
    current = ""
    for word in filter(None, (str(word).strip(SEPARATORS[1:]) for word in words)):
        if _KEY.match(word.lstrip(",")):
            yield from [current] if current else []
            current = word.lstrip(SEPARATORS)
        elif current.endswith(",") or depth_of(current):
            current += f" {word}"
        elif word == ",":
            current += word
        else:
            raise UserError(f"{option}: expected key=value, got '{word}'")
    yield from [current] if current else []


def _pairs_of(words: Iterable[str]) -> Iterable[str]:
    """Each word split where a key follows a separator, outside brackets and quotes."""
    for word in words:
        start, depth, quote = 0, 0, ""
        for position, letter in enumerate(word):
            if quote or (letter in "\"'" and (depth or word[:position].rstrip().endswith("="))):
                quote = "" if letter == quote else quote or letter
            elif letter in SEPARATORS and depth <= 0 and _KEY.match(word, position + 1):
                yield word[start : position + 1]
                start = position + 1
            depth += 0 if quote else depth_of(letter)
        yield word[start:]


def arguments_for(
    callee: Callable,
    words: Iterable[str] | None,
    option: str,
    given_elsewhere: Mapping[str, str] | None = None,
    read_other: Callable[[str], Any] = read_value,
) -> dict[str, Any]:
    """The pairs as keyword arguments of a function or class, each of the type of its annotation or its default.

    given_elsewhere: parameters that another option sets, with the cure for an error message.
    read_other: reads values for the callee's **kwargs.
    Raises UserError, which names key and value, for an unknown key or a value of another type.
    """
    texts, elsewhere = read_pairs(words, option), given_elsewhere or {}
    parameters = _parameters(callee)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values = {}
    for key, text in texts.items():
        if key in elsewhere:
            raise UserError(f"{option} {key}={text}: {elsewhere[key]}")
        if key in parameters:
            values[key] = _fitting(callee, parameters[key], text, option)
        elif open_ended or not parameters:
            values[key] = read_other(text)
        else:
            known = [name for name in parameters if name not in elsewhere]
            raise unknown(f"argument of {callee.__name__}", key, known, where=option)
    return values


def _parameters(callee: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a callee by name, with annotations as types where they can be resolved; empty without a signature."""
    try:
        parameters = dict(inspect.signature(callee).parameters)
    except (TypeError, ValueError):
        return {}
    try:
        hints = typing.get_type_hints(callee.__init__ if isinstance(callee, type) else callee)  # type: ignore[misc]
    except Exception:  # an annotation may be any text
        hints = {}
    return {name: parameter.replace(annotation=hints.get(name, Any)) for name, parameter in parameters.items()}


def _fitting(callee: Callable, parameter: inspect.Parameter, text: str, option: str) -> Any:
    """The value of a text, as the type that the parameter takes. Raises UserError if there is none."""
    kinds = [kind for kind in (parameter.annotation, _kind_of_default(parameter)) if kind is not Any]
    value = read_value(text)
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{option} {parameter.name}={text}: this is not a number; give one")
    for candidate in _readings(value, text) if kinds else [value]:
        if not kinds or any(_is_a(candidate, kind) for kind in kinds):
            return candidate
    raise UserError(f"{option} {parameter.name}={text}: {callee.__name__} takes {_in_words(kinds[-1])} there")


def _readings(value: Any, text: str) -> Iterable[Any]:
    """A value as other types that it may stand for, most likely first."""
    yield value
    if isinstance(value, int) and value in (0, 1):
        yield bool(value)
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, (list, tuple)):
        yield from (tuple(value), list(value))
    yield text


def _kind_of_default(parameter: inspect.Parameter) -> Any:
    """The type of a default value. A default of None without annotation stands for any type but text."""
    default = parameter.default
    if default is parameter.empty:
        return Any
    if isinstance(default, bool):
        return bool
    if isinstance(default, (int, float)):
        return int | float
    if isinstance(default, str):
        return str
    if isinstance(default, (list, tuple)) and all(isinstance(item, (int, float)) for item in default):
        return tuple.__class_getitem__((float | None,) * len(default))
    return bool | int | float | list | tuple | dict | None if default is None and parameter.annotation is Any else Any


def _is_a(value: Any, kind: Any) -> bool:
    try:
        TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError:
        return False
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError):  # an annotation that pydantic does not support
        return not isinstance(value, str)
    return True


def _in_words(kind: Any) -> str:
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return " or ".join(dict.fromkeys(_member_in_words(member) for member in members if member is not types.NoneType))


def _member_in_words(kind: Any) -> str:
    words = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    if typing.get_origin(kind) is tuple:
        return f"{len(typing.get_args(kind))} numbers with commas between them"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"
