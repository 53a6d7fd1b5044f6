"""One line of prompt as gen_img_diffusers.py reads it: the prompt, then options (`a cat --w 768 --d 1,2 --n blurry`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from library.diffusion.samplers import check_sampler
from library.errors import UserError, unknown
from library.generation.prompts import (
    MOST_STEPS,
    SIZE_STEP,
    SMALLEST_SIZE,
    DeepShrink,
    PromptSpec,
    read_integer,
    read_number,
    read_seed,
    read_value,
    split_line,
)
from library.generation.refused_options import REFUSED_INLINE


@dataclass(frozen=True)
class LineRules:
    """What this run allows: some in-line options say nothing without another option on the command line."""

    networks: int = 0  # how many networks --am can set
    redraws: bool = True  # whether there is a source image or a second stage for --t
    sheet: bool = False  # whether --sheet sets the strengths
    shrinks: bool = True  # whether Deep Shrink has a depth for --dst1, --dsd2, --dst2 and --dsr
    shrinks_twice: bool = True  # whether it has a second one for --dst2


@dataclass(frozen=True)
class PromptLine:
    """What a line sets. `values` are fields of `PromptSpec`, `shrink` of `DeepShrink`."""

    values: dict[str, Any]
    seeds: tuple[int, ...] | None = None
    shrink: dict[str, Any] = field(default_factory=dict)

    def spec(self, defaults: PromptSpec, shrink_defaults: dict[str, Any]) -> PromptSpec:
        """The image of this line; what it leaves open is as in the defaults. Nothing of it reaches other images."""
        shrink = shrink_defaults | self.shrink
        deep_shrink = DeepShrink(**shrink) if shrink.get("depth_1") is not None else None
        return replace(defaults, deep_shrink=deep_shrink, **self.values)


def _size(text: str) -> int:
    size = read_integer(text)
    if size < SMALLEST_SIZE or size % SIZE_STEP:
        raise ValueError(f"a multiple of {SIZE_STEP} from {SMALLEST_SIZE} on")
    return size


def _steps(text: str) -> int:
    steps = read_integer(text)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"a number of steps from 1 to {MOST_STEPS}")
    return steps


def _share(text: str) -> float:
    share = read_number(text)
    if not 0 <= share <= 1:
        raise ValueError("a number from 0 to 1")
    return share


def _ratio(text: str) -> float:
    ratio = read_number(text)
    if not 0 < ratio <= 1:
        raise ValueError("a number above 0 and at most 1")
    return ratio


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else read_number(text)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(read_seed(part.strip()) for part in text.split(","))


def _multipliers(text: str) -> tuple[float, ...]:
    try:
        return tuple(read_number(part) for part in text.split(","))
    except ValueError:
        raise ValueError("a list of numbers with commas") from None


def _depth(text: str) -> int:
    depth = read_integer(text)
    if not 0 <= depth <= 3:
        raise ValueError("a depth from 0 to 3")
    return depth


# In-line option: field of PromptSpec, of DeepShrink (after "shrink."), or "seeds"; reading of its value.
_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", _size),
    "h": ("height", _size),
    "s": ("steps", _steps),
    "d": ("seeds", _seeds),
    "l": ("scale", read_number),
    "nl": ("negative_scale", _number_or_none),
    "t": ("strength", _share),
    "am": ("multipliers", _multipliers),
    "ss": ("sampler", check_sampler),
    "dsd1": ("shrink.depth_1", _depth),
    "dst1": ("shrink.timestep_1", read_integer),
    "dsd2": ("shrink.depth_2", _depth),
    "dst2": ("shrink.timestep_2", read_integer),
    "dsr": ("shrink.ratio", _ratio),
}
INLINE_OPTIONS = tuple(_OPTIONS)


def read_prompt_line(line: str, where: str, rules: LineRules = LineRules(), columns: Sequence[int] | None = None) -> PromptLine:
    """The prompt and what its options set. An option given twice counts as given last.

    columns: the column of each character in the line as the user wrote it. Raises `UserError` naming `where`, column and option.
    """
    prompt, options = split_line(line)
    found: dict[str, Any] = {"prompt": prompt}
    for name, text, column in options:
        place = f"{where}, column {columns[column - 1] if columns else column}"
        if name in REFUSED_INLINE:
            raise UserError(f"{place}: option --{name} is not supported: {REFUSED_INLINE[name]}")
        if name not in _OPTIONS:
            raise unknown("option", f"--{name}", [f"--{known}" for known in (*_OPTIONS, *REFUSED_INLINE)], place)
        target, read = _OPTIONS[name]
        found[target] = read_value(text, read, f"--{name}", place)
        _check(name, found[target], place, rules)
    shrink = {target.removeprefix("shrink."): value for target, value in found.items() if target.startswith("shrink.")}
    if shrink and "depth_1" not in shrink and not rules.shrinks:
        raise UserError(f"{where}: Deep Shrink has no depth; give --dsd1 in the line or --ds_depth_1 on the command line")
    if "timestep_2" in shrink and "depth_2" not in shrink and not rules.shrinks_twice:
        raise UserError(f"{where}: Deep Shrink has no second depth; give --dsd2 in the line or --ds_depth_2 on the command line")
    values = {target: value for target, value in found.items() if "." not in target and target != "seeds"}
    return PromptLine(values, found.get("seeds"), shrink)


def _check(name: str, value: Any, place: str, rules: LineRules) -> None:
    if name == "am" and not rules.networks:
        raise UserError(f"{place}: option --am needs --network_weights that are not merged")
    if name == "am" and len(value) > rules.networks:
        raise UserError(f"{place}: option --am has {len(value)} strengths for {rules.networks} network(s); leave the surplus out")
    if name == "am" and rules.sheet:
        raise UserError(f"{place}: option --am has no place with --sheet, which compares the strengths of --sheet_strengths")
    if name == "t" and not rules.redraws:
        raise UserError(f"{place}: option --t needs --image_path or --highres_fix_scale on the command line")
