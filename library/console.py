"""Console output of a run, and --console_log_*."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from library.errors import UserError
from library.safe_text import SafeFormatter, on_terminal

# Loggers that advise to install packages which no run uses: bitsandbytes advises kernels for its 4-bit layers.
NEEDLESS_ADVISERS = ("bitsandbytes.backends.cpu.ops",)


def is_main_process() -> bool:
    """Whether this is the first, or the only, process of a run, by the launcher's variable RANK."""
    return int(os.environ.get("RANK", 0)) == 0


def quiet_unless_main() -> None:
    """Only rank 0 prints: in other processes discard standard output and warnings, and disable progress bars.

    Call it before tqdm is imported, which reads TQDM_DISABLE then. Standard error stays open for tracebacks.
    """
    if not is_main_process():
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
        logging.disable(logging.ERROR)


class WithoutRepeats(logging.Filter):
    """Drops repeated warnings: one about an image would otherwise come in every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._seen
        self._seen.add(text)
        return new or record.levelno < logging.WARNING


class KeptWarnings(logging.Handler):
    """Keeps the text of each warning, once; at most MOST of them."""

    MOST = 200

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.texts) < self.MOST:
            self.texts[on_terminal(record.getMessage())] = None


@contextmanager
def keeping_warnings() -> Iterator[KeptWarnings]:
    """Keep the suite's own warnings of the block; those of other packages are seldom about the run."""
    kept, root = KeptWarnings(), logging.getLogger()
    kept.addFilter(lambda record: record.name.startswith(("library.", "networks.")))
    root.addHandler(kept)
    try:
        yield kept
    finally:
        root.removeHandler(kept)


class LoggedLines:
    """Replaces standard output: every printed line becomes a log message of level INFO."""

    def __init__(self, log: logging.Logger) -> None:
        self.log, self._begun = log, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self.log.info(line.rstrip())
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def set_up_console(level: str | None, file: str | None, simple: bool) -> None:
    """Set up logging by --console_log_level, --console_log_file and --console_log_simple.

    Without a file, warnings go to standard error, and prints to standard output unless the level is above INFO. With a file both
    go to the file, with their time; the console shows the progress bar and the error that ends a run.
    """
    if not is_main_process():
        return
    threshold = getattr(logging, level or "INFO")
    handler = file_handler(file) if file else console_handler(simple)
    handler.addFilter(WithoutRepeats())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    silence_needless_advice()
    handler.setLevel(threshold)
    own = logging.getLogger("library")
    own.setLevel(threshold)
    if file:
        sys.stdout = LoggedLines(own)
    elif threshold > logging.INFO:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)


def silence_needless_advice() -> None:
    """Show no warnings of NEEDLESS_ADVISERS."""
    for name in NEEDLESS_ADVISERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class LogFile(logging.StreamHandler):
    """A file of log lines. When it cannot be written any more (a full disk), a line says so, and standard error gets the rest."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_lost = path, False
        super().__init__(open(path, "a", encoding="utf-8"))  # noqa: SIM115  (open to the end of the process)

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` where an error is raised; logging's own would print a traceback for each line."""
        error = sys.exc_info()[1]
        if self.is_lost or not isinstance(error, OSError):
            return
        self.is_lost, lost = True, self.stream
        with suppress(OSError):  # what is buffered cannot be written either
            lost.close()
        self.stream = sys.stderr
        print(f"warning: {self.path} cannot be written any more: {error.strerror}; its lines come here", file=sys.stderr)
        self.emit(record)


def file_handler(file: str) -> logging.Handler:
    """A handler that writes lines with time and level. Raises UserError if the file cannot be written."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(path)
    except OSError as error:
        raise UserError(f"--console_log_file {path} cannot be written: {error.strerror}; choose another file") from error
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def console_handler(simple: bool) -> logging.Handler:
    """A handler for standard error: coloured lines on a terminal, else plain ones, which programs can read."""
    if simple or not sys.stderr.isatty():
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(SafeFormatter("%(levelname_lower)s: %(message)s"))
        handler.addFilter(_lower_level)
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False, log_time_format="%H:%M:%S")
    handler.setFormatter(SafeFormatter("%(message)s"))
    return handler


def _lower_level(record: logging.LogRecord) -> bool:
    record.levelname_lower = record.levelname.lower()
    return True
