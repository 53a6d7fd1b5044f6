"""How every program runs: streams that take any text, errors of one line without a traceback, exit codes.

0: done; 1: the run could not continue; 2: wrong input; 120: what a tool printed could not be written; 130: interrupted.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from library.errors import UserError, problem_of_path
from library.safe_text import SafeFormatter, on_terminal

Main = Callable[[], int | None]


class SafeStream:
    """A text stream that never raises: not for a character that the console lacks, nor when the reader of the pipe has ended.

    has_lost: whether some text could not be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.has_lost = stream, False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # Windows consoles and redirected output are often not UTF-8

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # a stream without `reconfigure`
                self.stream.write(text.encode("ascii", "backslashreplace").decode())
        except OSError:
            self.has_lost = True
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.has_lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_entry(main: Main) -> NoReturn:
    """Run an entry script's `main` and end the process with its exit code."""
    sys.exit(_exit_code(main))


def run_tool(main: Main) -> NoReturn:
    """The same for a tool that takes a second or two: torch gets one thread, no garbage is collected, and the process ends
    without clean-up.

    Python's clean-up of torch and other modules takes 0.5 s, beside 1.3 s for importing torch. The garbage collector would go
    through torch's many objects again and again, for 0.3 s; tensors are freed without it.
    """
    gc.disable()
    # library/parallel.py makes the threads; torch's own would spin beside them while they wait.
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported, which is after the options are read
    code = _exit_code(main)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = any(getattr(stream, "has_lost", False) for stream in (sys.stdout, sys.stderr))
    os._exit(code or (120 if lost else 0))  # 120 is Python's own code for this


def _exit_code(main: Main) -> int:
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)  # type: ignore[assignment]
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter("warning: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        return main() or 0
    except UserError as error:
        return _print_errors(getattr(error, "problems", [str(error)]), error.exit_code)
    except OSError as error:
        problem = problem_of_path(error)
        if problem is None:
            raise
        return _print_errors([str(problem)], problem.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_errors(problems: list[str], code: int) -> int:
    sys.stdout.flush()
    for problem in problems:
        print(f"error: {on_terminal(' '.join(problem.split()))}", file=sys.stderr)
    return code
