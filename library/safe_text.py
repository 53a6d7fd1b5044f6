"""Text made safe for files, metadata, plots and terminals.

In a file name that is not UTF-8, Python has a lone surrogate for each wrong byte; JSON may hold half an emoji. Neither can be
encoded as UTF-8, so every writer would raise UnicodeEncodeError.
"""

from __future__ import annotations

import logging
import re
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Control characters control a terminal: those of a file name could clear the screen or hide a message. \n and \t are kept.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str, instead: str = REPLACEMENT) -> str:
    """The text with surrogate pairs joined, and `instead` for each lone surrogate.

    >>> as_unicode("caf\\udce9"), as_unicode("\\ud83d\\ude00 \\ud83d", instead="")
    ('caf\ufffd', '\U0001f600 ')
    """
    if is_unicode(text):
        return text
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return re.sub("[\ud800-\udfff]", instead, joined)


def on_terminal(text: str) -> str:
    """The text with control characters, except line ends and tabs, escaped (`\\x1b`)."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", as_unicode(text))


class SafeFormatter(logging.Formatter):
    """Formats a message and makes it safe for a terminal or a log file."""

    def format(self, record: logging.LogRecord) -> str:
        return on_terminal(super().format(record))


def bytes_of(text: str) -> bytes:
    """UTF-8 for a checksum. Also encodes lone surrogates, so different texts have different bytes."""
    return text.encode("utf-8", "surrogatepass")


def as_data(value: Any) -> Any:
    """The data with `as_unicode` applied to every text in it, keys too."""
    if isinstance(value, str):
        return as_unicode(value)
    if isinstance(value, dict):
        return {as_data(key): as_data(one) for key, one in value.items()}
    return [as_data(one) for one in value] if isinstance(value, (list, tuple)) else value
