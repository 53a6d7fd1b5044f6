"""Ctrl-C and kill signals: they end the run after the step that is running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

# Under a launcher of several processes one Ctrl-C comes twice: from the terminal and, a moment later, from the launcher.
SECOND_SIGNAL_AFTER = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C (or a kill signal) came; a second one ends the program at once."""
    asked: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked and time.monotonic() > asked[0] + SECOND_SIGNAL_AFTER:
            raise KeyboardInterrupt
        if asked:
            return
        asked.append(time.monotonic())
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once, without saving")

    handled = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not None]
    before = {s: signal.signal(s, note) for s in handled}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
