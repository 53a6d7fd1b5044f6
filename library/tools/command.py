"""What the commands of the tools have in common: options without abbreviations, errors of one line, exit codes.

0: done; 2: the input was wrong; 130: interrupted. An error names what is wrong and what to do, and comes without a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from library.errors import NEGATIVE, UserError, unknown


class _HelpFormatter(argparse.HelpFormatter):
    """Names the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, takes no abbreviations, and names the nearest option to an unknown one."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self._negative_number_matcher = NEGATIVE  # argparse's own takes no -5e-1

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            option = word.split("=", 1)[0]
            if option.startswith("--") and option != "--" and option not in self._option_string_actions:
                raise unknown("option", option, (name for name in self._option_string_actions if name.startswith("--")))
        known, rest = self.parse_known_args(words, namespace)
        if rest:
            raise UserError(f"unexpected word '{rest[0]}' on the command line; put values that hold spaces in quotes")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and leave the process with its exit code."""
    # library/parallel.py has the threads: torch's own would spin beside them while they wait, on a busy machine most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported, which is after the options are read
    for stream in (sys.stdout, sys.stderr):  # Windows consoles are often not UTF-8; a file name must never end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        code = 0
    except (UserError, OSError) as error:
        with suppress(OSError):
            sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process at once: Python would take torch and all else apart piece by piece first, which costs half a second."""
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError:  # whoever was to read it is gone, or the disk is full
        code = code or 120  # what Python itself says then
    os._exit(code)
