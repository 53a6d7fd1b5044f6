"""Files of prompts with their options: what images to make."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.diffusion.samplers import check_sampler
from library.errors import UserError, unknown
from library.text_files import lines_of, parse_json, parse_toml, read_text

log = logging.getLogger(__name__)

SIZE_STEP, SMALLEST_SIZE = 8, 64
MOST_STEPS = 1000
LARGEST_SEED = 2**64 - 1  # what torch accepts


@dataclass(frozen=True)
class DeepShrink:
    """Make the large forms of an image at a smaller size, so that a size beyond what the model was trained on keeps one subject.

    At depth `depth_1` of the U-Net (0 the outermost block, 3 the innermost), while the timestep is `timestep_1` or more, the
    features are shrunk by `ratio`; then at `depth_2`, if given, while it is `timestep_2` or more. On the way up they regain their
    size.
    """

    depth_1: int
    timestep_1: int = 650
    depth_2: int | None = None
    timestep_2: int = 650
    ratio: float = 0.5


@dataclass(frozen=True)
class PromptSpec:
    """One image to make. Sizes in pixels; `seed` None draws one; a guidance `scale` of 1 or less switches guidance off.

    negative_scale: the negative prompt gets a scale of its own: e = e_0 + scale (e_pos - e_0) - negative_scale (e_neg - e_0),
    where e_0 is the prediction for the empty prompt. None: e = e_neg + scale (e_pos - e_neg).
    multipliers: strengths of the networks in the order in which they were given, for this image; a short list is filled with
    its last number. None: those of the command line. The prompt may hold `<lora:name:0.8>` besides.
    image: an image to begin from; it is stretched to width x height. `strength` 0..1 is the share of the steps that is run: 0
    gives the image itself. mask: white is painted anew, black kept, grey between; needs an image.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    scale: float = 7.5
    steps: int = 30
    sampler: str = "ddim"
    negative_scale: float | None = None
    strength: float = 0.8
    multipliers: tuple[float, ...] | None = None
    image: Path | None = None
    mask: Path | None = None
    deep_shrink: DeepShrink | None = None


def read_integer(text: str) -> int:
    """A whole number. As every reader of a value it raises ValueError("what it wants")."""
    if not re.fullmatch(r"[+-]?\d+", text):
        raise ValueError("a whole number")
    return int(text)


def _size(text: str) -> int:
    size = read_integer(text)
    if size < 1:
        raise ValueError("a number of pixels")
    return max(SMALLEST_SIZE, size - size % SIZE_STEP)


def _steps(text: str) -> int:
    return min(max(read_integer(text), 1), MOST_STEPS)


def read_seed(text: str) -> int:
    """A seed that torch accepts."""
    seed = read_integer(text)
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"a whole number from 0 to {LARGEST_SEED}")
    return seed


def read_number(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def split_regions(prompt: str) -> list[str]:
    """The sub-prompts of a prompt for regions.

    >>> split_regions("a cat AND a dog")
    ['a cat', 'a dog']
    """
    return [part.strip() for part in prompt.split(" AND ")]


def check_regions(prompts: list[str], networks: int) -> None:
    """UserError unless each network has a sub-prompt."""
    if len(prompts) < networks:
        cure = "write one for each, with ' AND ' between"
        raise UserError(f"the prompt has {len(prompts)} part(s) for {networks} networks; {cure}")


def check_negative_scale(scale: float, negative_scale: float | None) -> None:
    """UserError for a scale of the negative prompt where it has no effect."""
    if negative_scale is not None and scale <= 1:
        raise UserError(f"a negative scale needs a scale above 1, as guidance is off at {scale:g}")


# In-line option, key in .toml and .json, field of PromptSpec, reading of its value. A reader raises ValueError("what it wants").
_OPTIONS: tuple[tuple[str, str, str, Callable[[str], Any]], ...] = (
    ("n", "negative_prompt", "negative_prompt", str),
    ("w", "width", "width", _size),
    ("h", "height", "height", _size),
    ("d", "seed", "seed", read_seed),
    ("l", "scale", "scale", read_number),
    ("s", "sample_steps", "steps", _steps),
    ("ss", "sample_sampler", "sampler", check_sampler),
)
_BY_OPTION = {option: (field, read) for option, _, field, read in _OPTIONS}
_BY_KEY = {"prompt": ("prompt", str)} | {key: (field, read) for _, key, field, read in _OPTIONS}
_OPTION_MARK = re.compile(r"(?:^|\s)--")
# For other model families, and ControlNet: harmless in files that people share, so they get a notice instead of an error.
_OTHER_OPTIONS = ("cn", "g", "ctr", "rcfg", "fs")
_OTHER_KEYS = ("controlnet_image",)


def read_prompt_file(path: str | Path, defaults: PromptSpec) -> list[PromptSpec]:
    """The prompts of a .toml or .json file, or of any other file as text with one prompt a line.

    `defaults` gives what a prompt leaves open. Raises `UserError` naming file, place and option for anything that is not
    understood, and for a file without prompts.
    """
    path = Path(path)
    text = read_text(path, "--sample_prompts")
    ignored: list[str] = []
    readers = {".toml": _from_toml, ".json": _from_json}
    specs = readers.get(path.suffix.lower(), _from_lines)(text, defaults, str(path), ignored)
    if not specs:
        raise UserError(f"prompt file '{path}' holds no prompt; write one prompt a line")
    _tell_ignored(ignored, str(path))
    return specs


def parse_prompt_line(line: str, defaults: PromptSpec, where: str = "prompt") -> PromptSpec:
    """One line: the prompt, then options, each after a space and two dashes (`a cat --w 768 --d 7 --n blurry`).

    An option given twice counts as given last. Raises `UserError` naming `where`, column (from 1) and option.
    """
    ignored: list[str] = []
    spec = _parse_line(line, defaults, where, ignored)
    _tell_ignored(ignored, where)
    return spec


def split_line(line: str) -> tuple[str, list[tuple[str, str, int]]]:
    """The prompt, and its options as (name in lower case, text of the value, column of the first dash from 1).

    The prompt is everything before the first " --" and is never searched for options: it may well begin "w 5 ...".
    """
    marks = list(_OPTION_MARK.finditer(line))
    starts = [mark.end() for mark in marks]
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    options = []
    for start, end in zip(starts, ends, strict=False):
        name, _, text = line[start:end].strip().partition(" ")
        options.append((name.lower(), text.strip(), start - 1))
    return line[: marks[0].start() if marks else None].strip(), options


def read_value(text: str, read: Callable[[str], Any], name: str, place: str) -> Any:
    """The value of an option. Raises `UserError` naming place and option."""
    if not text:
        raise UserError(f"{place}: option {name} has no value; write it after a space")
    try:
        return read(text)
    except ValueError as error:
        raise UserError(f"{place}: option {name} '{text}' is not {error}") from None
    except UserError as error:
        raise UserError(f"{place}: option {name}: {error}") from None


def _parse_line(line: str, defaults: PromptSpec, where: str, ignored: list[str]) -> PromptSpec:
    prompt, options = split_line(line)
    values: dict[str, Any] = {"prompt": prompt}
    for name, text, column in options:
        place = f"{where}, column {column}"
        if name in _OTHER_OPTIONS:
            ignored.append(f"--{name}")
            continue
        if name not in _BY_OPTION:
            raise unknown("option", f"--{name}", [f"--{known}" for known in (*_BY_OPTION, *_OTHER_OPTIONS)], place)
        field, read = _BY_OPTION[name]
        values[field] = read_value(text, read, f"--{name}", place)
    return replace(defaults, **values)


def _from_lines(text: str, defaults: PromptSpec, path: str, ignored: list[str]) -> list[PromptSpec]:
    return [
        _parse_line(line, defaults, f"{path}, line {number}", ignored)
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
    places = [f"[[prompt.subset]] {number}" for number in range(1, len(subsets) + 1)] if "subset" in table else ["[prompt]"]
    return [
        _from_table({**common, **subset}, defaults, f"{path}, {place}", ignored)
        for subset, place in zip(subsets, places, strict=False)
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
            specs.append(_parse_line(item, defaults, where, ignored))
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
        if key in _OTHER_KEYS:
            ignored.append(key)
            continue
        if key not in _BY_KEY:
            raise unknown("key", key, (*_BY_KEY, *_OTHER_KEYS), where)
        field, read = _BY_KEY[key]
        text_wanted = read in (str, check_sampler)
        if isinstance(value, bool) or not isinstance(value, str if text_wanted else (int, float)):
            raise UserError(f"{where}: key '{key}' must be {'text' if text_wanted else 'a number'}, not {value!r}")
        values[field] = value if read is str else read_value(str(value), read, f"'{key}'", where)
    return replace(defaults, **values)


def _tell_ignored(ignored: list[str], where: str) -> None:
    if ignored:
        log.warning(f"{where}: no effect on Stable Diffusion 1 and 2, ignored: {', '.join(dict.fromkeys(ignored))}")
