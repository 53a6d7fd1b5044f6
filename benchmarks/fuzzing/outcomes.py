"""Run a program in this process as its script would, and say how it ended."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import torch
from PIL import Image
from safetensors.torch import load_file

from library.entry import run_entry
from library.safe_text import SafeFormatter

LONGEST_SECONDS = 60  # an input that takes longer counts as a hang
MOST_ROUNDS = 10  # of LONGEST_SECONDS in which a program waits, for others or for ever
MOST_LINES = 40  # of error lines: a screen

Main = Callable[[], int | None]


class Reached(BaseException):
    """Raised in place of the slow work behind all checks: the input was taken."""


class Hang(BaseException):
    """The input took longer than LONGEST_SECONDS of the processor, or ten times that on the clock."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: exit code, printed text, and the traceback if there was one."""

    code: int
    text: str
    traceback: str = ""

    @property
    def ended_well(self) -> bool:
        return self.code == 0 and not self.traceback

    @property
    def is_refused(self) -> bool:
        """Exit code 2 and a line that says why."""
        return self.code == 2 and not self.traceback and 1 <= self.error_lines <= MOST_LINES

    @property
    def is_failed(self) -> bool:
        """Exit code 1 and a line that says why: the input was read, and what was to be done with it could not be."""
        return self.code == 1 and not self.traceback

    @property
    def error_lines(self) -> int:
        return self.text.count("error: ")


def run_program(main: Main, words: Sequence[str], folder: Path, stdin: bytes = b"", largest_file: int | None = None) -> Outcome:
    """`main` with these words on its command line, in `folder`.

    largest_file: bytes that a file may have, where the system knows such limits.
    """
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    code, trace = 0, ""
    with _as_a_process(words, folder, printed, stdin), _at_most(LONGEST_SECONDS), _files_up_to(largest_file):
        try:
            run_entry(main)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Reached:
            pass
        except BaseException:  # what would be a traceback on the screen
            code, trace = 1, traceback.format_exc()
    text = printed.buffer.getvalue().decode("utf-8", "replace")
    if "Traceback (most recent call last)" in text:
        trace = trace or text
    return Outcome(code, text, trace)


@contextlib.contextmanager
def _as_a_process(words: Sequence[str], folder: Path, printed: io.TextIOWrapper, stdin: bytes) -> Iterator[None]:
    """Words, folder, streams and logging of a process of its own; put back afterwards."""
    root, library = logging.getLogger(), logging.getLogger("library")
    kept = sys.argv, os.getcwd(), sys.stdin, sys.stdout, sys.stderr, root.handlers[:], root.level, library.level
    handler = logging.StreamHandler(printed)
    handler.setFormatter(SafeFormatter("warning: %(message)s"))
    sys.argv, sys.stdout, sys.stderr = ["program", *words], printed, printed
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors="surrogateescape")
    root.handlers[:] = [handler]
    os.chdir(folder)
    home = {"HOME": str(folder), "USERPROFILE": str(folder)}  # what a path with ~ names
    try:
        with warnings.catch_warnings(), mock.patch.dict(os.environ, home):
            yield
    finally:
        sys.argv, place, sys.stdin, sys.stdout, sys.stderr, root.handlers[:], level, of_library = kept
        os.chdir(place)
        root.setLevel(level)
        library.setLevel(of_library)
        logging.captureWarnings(False)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise Hang after that time, or later if less than half of it was the processor's, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    began, rounds = time.process_time(), iter(range(MOST_ROUNDS))

    def ring(*_: object) -> None:
        if time.process_time() - began < seconds / 2 and next(rounds, None) is not None:
            signal.alarm(seconds)  # other programs have the processor
            return
        raise Hang(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _files_up_to(size: int | None) -> Iterator[None]:
    """Let a file that would become larger fail to be written."""
    if size is None or resource is None:
        yield
        return
    before, compiles = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # Python would keep the half of what it compiles
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = compiles


# Temporary files and folders are named so: .name.12345678.suffix
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}(\.\w+)?|\.probe-.*")


def half_written(folder: Path) -> list[str]:
    """Files below `folder` that are not whole: temporary ones, also by their folder, and those that their own reader refuses."""
    return [str(path) for path in _files(folder) if any(map(TEMPORARY.fullmatch, path.parts)) or not _is_whole(folder / path)]


def _files(folder: Path) -> list[Path]:
    """Their paths below the folder."""
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def _is_whole(path: Path) -> bool:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return True
    try:
        reader(path)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, EOFError, SyntaxError):
        return False
    except Exception as error:  # safetensors has an error of its own
        if type(error).__name__ != "SafetensorError":
            raise
        return False
    return True


def _verify_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": load_file,
    ".ckpt": lambda path: torch.load(path, weights_only=True),
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".png": _verify_image,
    ".jpg": _verify_image,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
}


class Stopwatch:
    """Seconds by kind of input."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started
