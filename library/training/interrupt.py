"""Ctrl-C and kill signals: noted, and answered after the step that is running."""

from __future__ import annotations

import signal
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def stop_on_interrupt():
    """Gives a function that says whether Ctrl-C (or a kill signal) came; a second one ends the program at once."""
    asked: list[int] = []

    def note(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once, without saving")

    handled = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not None]
    before = {s: signal.signal(s, note) for s in handled}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
