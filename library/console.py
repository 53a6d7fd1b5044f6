"""What a run shows on the console, and --console_log_*."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from library.errors import UserError
from library.safe_text import SafeFormatter, on_terminal

# Loggers of libraries that advise to install what no run here uses: bitsandbytes names kernels of its 4-bit layers.
ADVISE_NEEDLESSLY = ("bitsandbytes.backends.cpu.ops",)


def is_main_process() -> bool:
    """Whether this is the first, or the only, process of a run, as the launcher says."""
    return int(os.environ.get("RANK", 0)) == 0


def quiet_unless_main() -> None:
    """Of several processes the main one alone prints: the others' standard output goes nowhere, and they draw no progress bars.

    To be called before tqdm is imported, which reads its switch then. Standard error stays open for what is unexpected.
    """
    if not is_main_process():
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open to the end of the process)
        logging.disable(logging.ERROR)


class Once(logging.Filter):
    """Lets every message through the first time, and not again: a warning about an image need not come in every epoch."""

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
    """Keep what the suite warns of within the block; what other packages warn of is seldom about the run."""
    kept, root = KeptWarnings(), logging.getLogger()
    kept.addFilter(lambda record: record.name.startswith(("library.", "networks.")))
    root.addHandler(kept)
    try:
        yield kept
    finally:
        root.removeHandler(kept)


class LoggedLines:
    """Stands for standard output: every line that is printed becomes a message of level INFO."""

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
    """Messages by --console_log_level, --console_log_file and --console_log_simple.

    Without a file, what is printed goes to standard output as ever, unless the level is above INFO, and warnings go to standard
    error. With a file both go there with their time, and the console keeps the progress bar and the error that ends a run.
    """
    if not is_main_process():
        return
    threshold = getattr(logging, level or "INFO")
    handler = file_handler(file) if file else console_handler(simple)
    handler.addFilter(Once())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    silence_needless_advice()
    handler.setLevel(threshold)
    own = logging.getLogger("library")
    own.setLevel(threshold)
    if file:
        sys.stdout = LoggedLines(own)
    elif threshold > logging.INFO:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open to the end of the process)


def silence_needless_advice() -> None:
    """Show no warnings of loggers that advise to install what no run uses."""
    for name in ADVISE_NEEDLESSLY:
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
    """Lines with time and level. Raises UserError if the file cannot be written."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(path)
    except OSError as error:
        raise UserError(f"--console_log_file {path} cannot be written: {error.strerror}; choose another file") from error
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def console_handler(simple: bool) -> logging.Handler:
    """On a terminal coloured lines by rich, else plain ones, which other programs can read."""
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
