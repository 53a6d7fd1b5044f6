"""Captions: found beside the image, and changed at each use as the subset asks."""

from __future__ import annotations

import errno
import logging
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from library.data.config_keys import SubsetConfig, without
from library.errors import UserError
from library.files import names_by_look
from library.option_traits import fields_with
from library.text_files import decoded, lines_of

log = logging.getLogger(__name__)


def caption_candidates(image_path: Path, extension: str) -> list[Path]:
    """Where a caption may lie, best first. Face crops "name_cx_cy_w_h.png" share the caption "name" of their image."""
    candidates = [image_path.with_name(image_path.stem + extension)]
    parts = image_path.stem.split("_")
    if len(parts) >= 5:
        candidates.append(image_path.with_name("_".join(parts[:-4]) + extension))
    return candidates


def read_caption(image_path: Path, subset: SubsetConfig) -> str | None:
    """The caption of an image: from its file, else the class tokens, else None.

    The first line that is not blank counts; with enable_wildcard all of them do, kept apart by line ends.
    An empty file is an empty caption, and is said. Raises UserError if the file is no UTF-8.
    """
    for path in map(_as_on_disk, caption_candidates(image_path, subset.caption_extension)):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # with the suffix; so there is no such file
                continue
            raise UserError(f"caption {path} cannot be read: {error.strerror or error}") from error
        return _caption_in(content, path, subset)
    return subset.class_tokens


def _as_on_disk(path: Path) -> Path:
    """The caption's path, with the accents of its name as its folder has them: image and caption may come from two systems."""
    if path.name.isascii():
        return path
    return path.with_name(names_by_look(path.parent).get(unicodedata.normalize("NFC", path.name), path.name))


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
        say_first_line_counts(path.parent)
    return "\n".join(lines) if subset.enable_wildcard else lines[0]


@cache
def say_first_line_counts(place: Path) -> None:
    """Once a folder or metadata file: it may hold thousands of such captions."""
    log.warning("%s: there are captions of more than one line; only the first line is used (enable_wildcard uses all)", place)


def process_caption(
    caption: str, subset: SubsetConfig, rng: random.Random, *, epoch: int, step: int, max_train_steps: int
) -> str:
    """The caption as one use of the image sees it.

    `epoch` counts from 1, `step` (of the optimizer, for the tag warm-up) from 0. All chance comes from `rng`.
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
        head, flexible, tail = _split(caption, subset)
        flexible = flexible[: _warmed_up(len(flexible), subset, step, max_train_steps)]
        if subset.shuffle_caption:
            rng.shuffle(flexible)
        if subset.caption_tag_dropout_rate > 0:
            flexible = [piece for piece in flexible if rng.random() >= subset.caption_tag_dropout_rate]
        caption = joint(subset).join(head + flexible + tail)
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
    """Replace each {a|b|c} by one of its parts, the inner ones first; {{ and }} are braces unless nesting explains them."""
    escaped = caption.replace("{{", "\0").replace("}}", "\1")
    nested = not _is_balanced(escaped) and _is_balanced(caption)  # such as {red|{light|dark}}
    before, caption = "", caption if nested else escaped
    while caption != before:
        before, caption = caption, re.sub(r"\{([^{}]+)\}", lambda found: rng.choice(found[1].split("|")), caption)
    return caption.replace("\0", "{").replace("\1", "}")


def _is_balanced(caption: str) -> bool:
    """Whether each brace has its partner."""
    depth = 0
    for letter in caption:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def _split(caption: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """Pieces at the head and the tail, which stay as they are, and those between. Blank pieces are left out."""
    mark = subset.keep_tokens_separator
    if mark and mark in caption:
        parts = caption.split(mark, 2)
        head, flexible, tail = (_pieces(part, subset) for part in [*parts, ""][:3])
        return head, flexible, tail
    pieces = _pieces(caption, subset)
    return pieces[: subset.keep_tokens], pieces[subset.keep_tokens :], []


def _pieces(text: str, subset: SubsetConfig) -> list[str]:
    return [piece.strip() for piece in text.split(subset.caption_separator) if piece.strip()]


def joint(subset: SubsetConfig) -> str:
    """What joins the pieces: the separator they were split at, a comma with its usual blank."""
    return ", " if subset.caption_separator == "," else subset.caption_separator


def _warmed_up(count: int, subset: SubsetConfig, step: int, max_train_steps: int) -> int:
    """How many of `count` pieces are used: token_warmup_min at step 0, growing evenly to all at token_warmup_step."""
    warmup, least = subset.token_warmup_step, subset.token_warmup_min
    if warmup < 1:
        warmup = math.floor(warmup * max_train_steps)
    if step >= warmup:
        return count
    return min(count, math.floor(step * (count - least) / warmup) + least)


def caption_is_fixed(subset: SubsetConfig) -> bool:
    """True if each image has one and the same caption at every use."""
    return not _in_use(subset, "caption", "dropout")


def _in_use(subset: SubsetConfig, *varies: str) -> bool:
    """Whether a key is set that makes this different from use to use."""
    return any(getattr(subset, key) for key in fields_with(type(subset), varies=varies))


def caption_variants(caption: str, subset: SubsetConfig) -> tuple[str, ...] | None:
    """All that `process_caption` can make of a caption: the text, and "" if it may be dropped. None if there are many."""
    if _in_use(subset, "caption"):
        return None
    kept = without(subset, "dropout")
    text = process_caption(caption, kept, random.Random(0), epoch=1, step=0, max_train_steps=0)
    return (text,) if caption_is_fixed(subset) or not text else (text, "")


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """Pieces between commas, in lower case, with the number of times they occur (`ss_tag_frequency`)."""
    return dict(
        Counter(
            tag
            for caption in captions
            for line in caption.split("\n")
            for piece in line.split(",")
            if (tag := piece.strip().lower())
        )
    )
