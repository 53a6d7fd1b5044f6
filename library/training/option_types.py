"""Types of option values that may be written in several ways: text on the command line, lists in files, 0 for what is off."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer


def _as_text(value: Any) -> Any:
    """`[512, 768]` or `512` of a config file as the command line writes it; library.data.config reads it."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return str(value)


def _as_list(value: Any) -> Any:
    """One value as a list of one; an empty list as nothing."""
    return (value or None) if isinstance(value, list) or value is None else [value]


def _one_or_several(values: list[float] | None) -> float | list[float] | None:
    """A list of one rate as the rate itself."""
    return values[0] if values and len(values) == 1 else values


def _none_if_off(value: Any) -> Any:
    """None for 0 and less, as front ends write what is off."""
    return None if str(value).removeprefix("-").isdecimal() and int(value) <= 0 else value


def _chunk_lengths(value: Any) -> Any:
    """Digits as a number, since the command line gives text; 75 is the same as nothing."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return None if number == 75 else number


def steps_or_share(text: Any) -> int | float:
    """`100` (steps), `0.1` or `10%` (share of all steps, as a float below 1)."""
    written = str(text).strip()
    try:
        number = float(written[:-1]) / 100 if written.endswith("%") else float(written)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e12 or (number > 1 and number != int(number)) or (written.endswith("%") and number > 1):
        raise ValueError(f"expected a number of steps (100), a share below 1 (0.1) or a percentage (10%), got {text!r}")
    return number if written.endswith("%") or 0 < number < 1 else int(number)


# Sizes and ranges such as `512,768`; a list in a config file.
NumbersAsText = Annotated[str | None, BeforeValidator(_as_text)]
# An int is steps, a float below 1 a share of all steps.
StepsOrShare = Annotated[int | float, BeforeValidator(steps_or_share)]
Count = Annotated[int, Field(ge=1)]
# Front ends write 0 for what is off.
CountOrOff = Annotated[Count | None, BeforeValidator(lambda value: None if value in (0, "0") else value)]
IntervalOrOff = Annotated[int | None, BeforeValidator(_none_if_off)]
Rate = Annotated[float, Field(ge=0)]
# One rate, or one for each text encoder.
Rates = Annotated[
    list[Rate] | None, BeforeValidator(_as_list), AfterValidator(_one_or_several), PlainSerializer(lambda rates: rates)
]
# Tokens of a caption.
TokenLimit = Annotated[Literal[150, 225] | None, BeforeValidator(_chunk_lengths)]
