"""Asking for prompts: with line editing and history where the system has them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

PROMPT = "prompt> "
MAX_REMEMBERED = 1000


def ask_for_prompts(history: Path) -> Iterator[str]:
    """Lines from standard input until its end (Ctrl-D, in Windows Ctrl-Z and Enter); empty ones are asked for again.

    history: where earlier lines are kept, from session to session, for the arrow keys. Without the module readline (Windows) the
    console's own editing has to do.
    """
    readline = _line_editing(history)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is no UTF-8 is named with its prompt, and ends nothing
    try:
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                print()
                return
            if line:
                yield line
    finally:
        if readline is not None:
            with suppress(OSError, UnicodeError):
                history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(history)


def _line_editing(history: Path):
    """The module readline with the history loaded; None where there is none, or where nobody types."""
    if not sys.stdin.isatty():
        return None
    try:
        import readline
    except ImportError:
        return None
    readline.set_history_length(MAX_REMEMBERED)
    with suppress(OSError):  # none yet, or of the other kind of readline
        readline.read_history_file(history)
    return readline


def show(image: Image.Image) -> None:
    """Open the image in the system's viewer, if there is a screen."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    with suppress(Exception):  # a viewer that does not start is no reason to stop drawing
        image.show()
