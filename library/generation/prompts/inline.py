"""Options in a line of prompt (`a cat --w 768 --d 7 --n blurry`), for images and for previews while training.

One table lists the options. In the prompts of previews (`lenient`) only what has a `key` is known, sizes are rounded and steps
clamped, as files that people share expect. For drawing all of it is known and a wrong value is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from library.diffusion.samplers import check_sampler
from library.errors import UserError, unknown
from library.generation.prompts.spec import LARGEST_SEED, MAX_STEPS, SIZE_STEP, SMALLEST_SIZE
from library.generation.unsupported_options import UNSUPPORTED_INLINE

Reader = Callable[[str], Any]  # text -> value; raises ValueError("what it wants") or UserError


def read_integer(text: str) -> int:
    """A whole number."""
    if not re.fullmatch(r"[+-]?\d+", text):
        raise ValueError("a whole number")
    return int(text)


def read_number(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def _within(read: Callable[[str], float], least: float, most: float, what: str) -> Reader:
    """A reader of numbers from `least` to `most`, both included."""

    def reader(text: str) -> Any:
        number = read(text)
        if not least <= number <= most:
            raise ValueError(what)
        return number

    return reader


_steps = _within(read_integer, 1, MAX_STEPS, f"a number of steps from 1 to {MAX_STEPS}")
_seed = _within(read_integer, 0, LARGEST_SEED, f"a whole number from 0 to {LARGEST_SEED}")  # those that torch accepts
_share = _within(read_number, 0, 1, "a number from 0 to 1")
_depth = _within(read_integer, 0, 3, "a depth from 0 to 3")
_pixels = _within(read_integer, 1, math.inf, "a number of pixels")
_crop = _within(read_integer, 0, math.inf, "a number of pixels, or 0")


def _size(text: str) -> int:
    size = read_integer(text)
    if size < SMALLEST_SIZE or size % SIZE_STEP:
        raise ValueError(f"a multiple of {SIZE_STEP} from {SMALLEST_SIZE} on")
    return size


def _rounded_size(text: str) -> int:
    size = _pixels(text)
    return max(SMALLEST_SIZE, size - size % SIZE_STEP)


def _clamped_steps(text: str) -> int:
    return min(max(read_integer(text), 1), MAX_STEPS)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(_seed(part.strip()) for part in text.split(","))


def _ratio(text: str) -> float:
    ratio = read_number(text)
    if not 0 < ratio <= 1:
        raise ValueError("a number above 0 and at most 1")
    return ratio


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else read_number(text)


def _multipliers(text: str) -> tuple[float, ...]:
    try:
        return tuple(read_number(part) for part in text.split(","))
    except ValueError:
        raise ValueError("a list of numbers with commas") from None


class InlineOption(NamedTuple):
    """An in-line option.

    field: of `PromptSpec`; "seeds"; or of `DeepShrink` after "deep_shrink.", of `SizeConditioning` after "sizes.".
    key: its name in .toml and .json files of previews; None: previews do not have it. lenient: field and reader there, if they
    are others.
    """

    field: str
    read: Reader
    key: str | None = None
    lenient: tuple[str, Reader] | None = None

    def of(self, lenient: bool) -> tuple[str, Reader]:
        """Field and reader."""
        return self.lenient if lenient and self.lenient else (self.field, self.read)


OPTIONS: dict[str, InlineOption] = {
    "n": InlineOption("negative_prompt", str, "negative_prompt"),
    "w": InlineOption("width", _size, "width", ("width", _rounded_size)),
    "h": InlineOption("height", _size, "height", ("height", _rounded_size)),
    "s": InlineOption("steps", _steps, "sample_steps", ("steps", _clamped_steps)),
    "d": InlineOption("seeds", _seeds, "seed", ("seed", _seed)),
    "l": InlineOption("scale", read_number, "scale"),
    "nl": InlineOption("negative_scale", _number_or_none),
    "t": InlineOption("strength", _share),
    "am": InlineOption("multipliers", _multipliers),
    "ss": InlineOption("sampler", check_sampler, "sample_sampler"),
    "dsd1": InlineOption("deep_shrink.depth_1", _depth),
    "dst1": InlineOption("deep_shrink.timestep_1", read_integer),
    "dsd2": InlineOption("deep_shrink.depth_2", _depth),
    "dst2": InlineOption("deep_shrink.timestep_2", read_integer),
    "dsr": InlineOption("deep_shrink.ratio", _ratio),
    "ow": InlineOption("sizes.original_width", _pixels),
    "oh": InlineOption("sizes.original_height", _pixels),
    "nw": InlineOption("sizes.original_width_negative", _pixels),
    "nh": InlineOption("sizes.original_height_negative", _pixels),
    "ct": InlineOption("sizes.crop_top", _crop),
    "cl": InlineOption("sizes.crop_left", _crop),
}
# In prompts of previews: for other model families, and ControlNet. Harmless in files that people share, so a notice, no error.
IGNORED_IN_PREVIEWS = ("cn", "g", "ctr", "rcfg", "fs")
_MARK = re.compile(r"(?:^|\s)--")


def parse_line(
    line: str,
    where: str,
    *,
    lenient: bool = False,
    ignored: list[str] | None = None,
    columns: Sequence[int] | None = None,
    check: Callable[[str, Any], object] = lambda name, value: None,
) -> dict[str, Any]:
    """The values that a line sets, by field; "prompt" is always there. An option given twice counts as given last.

    lenient: as in prompts of previews; options that have no effect there are added to `ignored`. columns: the column of each
    character in the line as the user wrote it. check: called with name and value of each option; its UserError gets
    `where` and column in front. Raises UserError naming `where`, column (from 1) and option.
    """
    prompt, options = split_line(line)
    known = {name: option for name, option in OPTIONS.items() if option.key or not lenient}
    others = IGNORED_IN_PREVIEWS if lenient else tuple(UNSUPPORTED_INLINE)
    values: dict[str, Any] = {"prompt": prompt}
    for name, text, column in options:
        location = f"{where}, column {columns[column - 1] if columns else column}"
        if name in others and lenient:
            if ignored is not None:
                ignored.append(f"--{name}")
            continue
        if name in others:
            raise UserError(f"{location}: option --{name} is not supported: {UNSUPPORTED_INLINE[name]}")
        if name not in known:
            raise unknown("option", f"--{name}", [f"--{word}" for word in (*known, *others)], location)
        field, read = known[name].of(lenient)
        values[field] = read_value(text, read, f"--{name}", location)
        try:
            check(name, values[field])
        except UserError as error:
            raise UserError(f"{location}: option --{name} {error}") from None
    return values


def split_line(line: str) -> tuple[str, list[tuple[str, str, int]]]:
    """The prompt, and its options as (name in lower case, text of the value, column of the first dash from 1).

    The prompt is everything before the first " --" and is never searched for options: it may well begin "w 5 ...".
    """
    marks = list(_MARK.finditer(line))
    starts = [mark.end() for mark in marks]
    ends = [*[mark.start() for mark in marks[1:]], len(line)]
    options = []
    for start, end in zip(starts, ends, strict=False):
        name, _, text = line[start:end].strip().partition(" ")
        options.append((name.lower(), text.strip(), start - 1))
    return line[: marks[0].start() if marks else None].strip(), options


def read_value(text: str, read: Reader, name: str, where: str) -> Any:
    """The value of an option. Raises `UserError` naming `where` and option."""
    if not text:
        raise UserError(f"{where}: option {name} has no value; write it after a space")
    try:
        return read(text)
    except ValueError as error:
        raise UserError(f"{where}: option {name} '{text}' is not {error}") from None
    except UserError as error:
        raise UserError(f"{where}: option {name}: {error}") from None
