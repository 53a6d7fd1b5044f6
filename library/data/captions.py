"""Captions: read from files beside the images, and processed at each use (dropout, shuffling, ...)."""

from __future__ import annotations

import errno
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from library.data.config_keys import SubsetConfig, without
from library.errors import UserError
from library.files import composed, names_by_nfc
from library.option_traits import fields_with
from library.text_files import decoded, lines_of

log = logging.getLogger(__name__)


def caption_candidates(image_path: Path, extension: str) -> list[Path]:
    """Paths of an image's caption, best first. A face crop "name_cx_cy_w_h.png" may share the caption "name" of its image."""
    candidates = [image_path.with_name(image_path.stem + extension)]
    parts = image_path.stem.split("_")
    if len(parts) >= 5:
        candidates.append(image_path.with_name("_".join(parts[:-4]) + extension))
    return candidates


def read_caption(image_path: Path, subset: SubsetConfig) -> str | None:
    """The caption of an image: from its file, else the class tokens, else None.

    It is the first line that is not blank; with enable_wildcard all lines that are not blank, joined by line ends.
    An empty file gives an empty caption, with a warning. Raises UserError if the file is not UTF-8.
    """
    for path in map(_as_on_disk, caption_candidates(image_path, subset.caption_extension)):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # only with the suffix; so there is no such file
                continue
            raise UserError(f"caption {path} cannot be read: {error.strerror or error}") from error
        return _caption_in(content, path, subset)
    return subset.class_tokens


def _as_on_disk(path: Path) -> Path:
    """The path with its accents encoded as in its folder: image and caption may come from two systems."""
    if path.name.isascii():
        return path
    return path.with_name(names_by_nfc(path.parent).get(composed(path.name), path.name))


def _caption_in(content: bytes, path: Path, subset: SubsetConfig) -> str:
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        raise UserError(f"caption {path}: byte {error.start} is no UTF-8 ({error.reason}); save the file as UTF-8") from error
    lines = [line.strip() for line in lines_of(text) if line.strip()]
    if not lines:
        log.warning("caption %s is empty; the image is trained with an empty caption", path)
        return ""
    if len(lines) > 1 and not subset.enable_wildcard:
        warn_of_unused_lines(path.parent)
    return "\n".join(lines) if subset.enable_wildcard else lines[0]


@cache
def warn_of_unused_lines(source: Path) -> None:
    """Warn once for each folder or metadata file, which may hold thousands of captions of several lines."""
    log.warning("%s: there are captions of more than one line; only the first line is used (enable_wildcard uses all)", source)


def process_caption(
    caption: str, subset: SubsetConfig, rng: random.Random, *, epoch: int, step: int, max_train_steps: int
) -> str:
    """The caption for one use of the image.

    `epoch` counts from 1; `step`, of the optimizer, from 0 (for token_warmup_step). All random numbers come from `rng`.
    """
    if _is_dropped(subset, rng, epoch):
        return ""
    caption = _with_prefix_and_suffix(caption, subset)
    lines = caption.split("\n")
    caption = rng.choice(lines) if subset.enable_wildcard else lines[0]
    if subset.enable_wildcard:
        caption = _choose_alternatives(caption, rng)

    has_marks = bool(subset.keep_tokens_separator) and subset.keep_tokens_separator in caption
    if has_marks or subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0:
        head, tags, tail = _split(caption, subset)
        tags = tags[: _tags_in_use(len(tags), subset, step, max_train_steps)]
        if subset.shuffle_caption:
            rng.shuffle(tags)
        if subset.caption_tag_dropout_rate > 0:
            tags = [tag for tag in tags if rng.random() >= subset.caption_tag_dropout_rate]
        caption = tag_joiner(subset).join(head + tags + tail)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _is_dropped(subset: SubsetConfig, rng: random.Random, epoch: int) -> bool:
    every = subset.caption_dropout_every_n_epochs
    if every and epoch % every == 0:
        return True
    return subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate


def _with_prefix_and_suffix(caption: str, subset: SubsetConfig) -> str:
    prefix = f"{subset.caption_prefix} " if subset.caption_prefix else ""
    suffix = f" {subset.caption_suffix}" if subset.caption_suffix else ""
    return "\n".join(f"{prefix}{line}{suffix}" for line in caption.split("\n"))


def _choose_alternatives(caption: str, rng: random.Random) -> str:
    """Replace each {a|b|c} by one of its parts, inner ones first. {{ and }} stand for braces, unless alternatives are nested."""
    escaped = caption.replace("{{", "\0").replace("}}", "\1")
    nested = not _is_balanced(escaped) and _is_balanced(caption)  # such as {red|{light|dark}}
    before, caption = "", caption if nested else escaped
    while caption != before:
        before, caption = caption, re.sub(r"\{([^{}]+)\}", lambda found: rng.choice(found[1].split("|")), caption)
    return caption.replace("\0", "{").replace("\1", "}")


def _is_balanced(caption: str) -> bool:
    """Whether every brace is closed."""
    depth = 0
    for letter in caption:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def _split(caption: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """Tags of the head, of the middle and of the tail; head and tail are never shuffled or dropped. Blank tags are left out."""
    mark = subset.keep_tokens_separator
    if mark and mark in caption:
        parts = caption.split(mark, 2)
        head, middle, tail = (_tags(part, subset) for part in [*parts, ""][:3])
        return head, middle, tail
    tags = _tags(caption, subset)
    return tags[: subset.keep_tokens], tags[subset.keep_tokens :], []


def _tags(text: str, subset: SubsetConfig) -> list[str]:
    return [tag.strip() for tag in text.split(subset.caption_separator) if tag.strip()]


def tag_joiner(subset: SubsetConfig) -> str:
    """The text between joined tags: the separator at which they were split; after a comma also a blank."""
    return ", " if subset.caption_separator == "," else subset.caption_separator


def _tags_in_use(count: int, subset: SubsetConfig, step: int, max_train_steps: int) -> int:
    """How many of `count` tags are used: token_warmup_min at step 0, linearly more until all at token_warmup_step."""
    warmup, least = subset.token_warmup_step, subset.token_warmup_min
    if warmup < 1:
        warmup = math.floor(warmup * max_train_steps)
    if step >= warmup:
        return count
    return min(count, math.floor(step * (count - least) / warmup) + least)


def caption_is_fixed(subset: SubsetConfig) -> bool:
    """Whether each image has the same caption at every use."""
    return not _has_any(subset, "caption", "dropout")


def _has_any(subset: SubsetConfig, *varies: str) -> bool:
    """Whether a key of the subset is set that has one of these values of `Traits.varies`."""
    return any(getattr(subset, key) for key in fields_with(type(subset), varies=varies))


def possible_captions(caption: str, subset: SubsetConfig) -> tuple[str, ...] | None:
    """All results of `process_caption`: the text, and "" if it may be dropped. None if other keys change captions."""
    if _has_any(subset, "caption"):
        return None
    kept = without(subset, "dropout")
    text = process_caption(caption, kept, random.Random(0), epoch=1, step=0, max_train_steps=0)
    return (text,) if caption_is_fixed(subset) or not text else (text, "")


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag occurs, in lower case; tags end at commas (`ss_tag_frequency`)."""
    return dict(
        Counter(
            tag
            for caption in captions
            for line in caption.split("\n")
            for part in line.split(",")
            if (tag := part.strip().lower())
        )
    )
