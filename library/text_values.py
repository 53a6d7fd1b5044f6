"""What texts of options stand for: numbers, switches, lists."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

# A command line argument that begins like an option and is a number, or a list of numbers: -.5, -5e-1, -1,0.5,1
NEGATIVE = re.compile(r"-(?:[\d.][\d.,eE_+-]*|inf(?:inity)?|nan)$", re.IGNORECASE)
_NUMBERS = re.compile(r"(?:--\w+=)?[\[\d.,eE_+\-\u2212\u2013\] ]+")
_MINUS_OF_TEXTS = re.compile(r"(?<![^=,\[ eE])[\u2212\u2013](?=[\d.])")  # the minus sign and the dash, before a number

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False), "none": None, "null": None,
}  # fmt: skip


def read_value(text: str) -> Any:
    """The number, bool, None, or tuple or list of these, that a text stands for; else the text itself.

    >>> [read_value(text) for text in ("1e-4", "false", "Off", "0.9,0.99", "[1, 2]", "inf", "cosine")]
    [0.0001, False, False, (0.9, 0.99), [1, 2], inf, 'cosine']
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        overflows = abs(number) == math.inf and text.lstrip("+-")[0] in ".0123456789"  # nobody means infinity by 1e400
        return text if overflows else number
    inner = _without_brackets(text)
    items = _items_of(inner)
    if (len(items) > 1 or inner is not text) and all(item.strip() for item in items[:-1]):
        values = [read_value(item) for item in items if item.strip()]
        return values if text[:1] == "[" else tuple(values) if len(items) > 1 or not values else values[0]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def with_plain_minus(text: str) -> str:
    """A number or a list of numbers, also after `--option=`, with the minus that programs read; any other text as it is.

    Web pages and word processors write another sign.

    >>> [with_plain_minus(text) for text in ("\u22120.5", "--lbw=1,\u2013.5", "2020\u20132021", "a\u22121")]
    ['-0.5', '--lbw=1,-.5', '2020–2021', 'a−1']
    """
    return _MINUS_OF_TEXTS.sub("-", text) if _NUMBERS.fullmatch(text) else text


def _items_of(text: str) -> list[str]:
    """Parts between commas, not counting commas in brackets."""
    items, depth = [""], 0
    for letter in text:
        depth += depth_of(letter)
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    return items


def _without_brackets(text: str) -> str:
    """A list without the round or square brackets around it.

    >>> [_without_brackets(text) for text in ("(1, 2)", "[1]", "1, 2")]
    ['1, 2', '1', '1, 2']
    """
    return text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text


def depth_of(text: str) -> int:
    """Brackets that are open at its end."""
    return sum((letter in "([{") - (letter in ")]}") for letter in text)
