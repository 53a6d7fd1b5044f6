"""How programs end. test_merge_lora.py has one that runs as people run it."""

from __future__ import annotations

import gc
import logging
import os
import sys
from io import StringIO

import pytest

from library.entry import SafeStream, run_entry, run_tool
from library.errors import RunFailed, UserError, UserErrors


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """Put back what belongs to the process; os._exit raises SystemExit."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # run_tool sets it for good
    yield
    gc.enable()  # run_tool disables it for good


def exit_code(run, main) -> int:
    with pytest.raises(SystemExit) as ended:
        run(main)
    return ended.value.code


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("run", [run_entry, run_tool])
@pytest.mark.parametrize(
    "error, code, lines",
    [
        (UserError("a\nb"), 2, ["error: a b"]),
        (UserErrors(["one", "two"]), 2, ["error: one", "error: two"]),
        (RunFailed("nan"), 1, ["error: nan"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (UserError("b\udce9 \x1b[2J"), 2, ["error: b\ufffd \\x1b[2J"]),
    ],
)
def test_a_program_ends_in_lines_and_an_exit_code(capsys, run, error, code, lines):
    assert exit_code(run, raising(error)) == code
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("run", [run_entry, run_tool])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "shut/a"), OSError(36, "Name too long", "shut/a")])
def test_a_path_that_cannot_be_looked_at_is_one_line(capsys, run, error):
    assert exit_code(run, raising(error)) == 2
    assert capsys.readouterr().err.startswith(f"error: shut/a: {error.strerror}; check")


@pytest.mark.parametrize("run", [run_entry, run_tool])
def test_a_full_disk_that_no_writer_speaks_of_is_one_line(capsys, run):
    assert exit_code(run, raising(OSError(28, "No space left on device"))) == 2
    assert capsys.readouterr().err.startswith("error: a file cannot be written: No space left on device; make room")


@pytest.mark.parametrize("run", [run_entry, run_tool])
def test_a_program_passes_its_code_on_and_lets_bugs_show(run):
    assert exit_code(run, lambda: 3) == 3
    assert exit_code(run, lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_warnings_are_lines_without_what_steers_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert exit_code(run_entry, lambda: logging.getLogger("library").warning("a\udce9 \x1b[2J")) == 0
    assert capsys.readouterr().err.splitlines() == ["warning: a\ufffd \\x1b[2J"]


class Gone(StringIO):
    """A stream whose reader is gone."""

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_tools_output_that_nobody_could_read_is_no_success(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert exit_code(run_tool, lambda: print("saved")) == 120
    assert exit_code(run_tool, raising(UserError("wrong"))) == 2
    assert exit_code(run_entry, lambda: print("saved")) == 0  # a run goes on without its reader


def test_output_into_a_closed_pipe_or_an_old_console_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    stream = SafeStream(open(write, "w", encoding="ascii"))  # noqa: SIM115  (closing it would fail)
    for _ in range(3):
        assert stream.write("größe\n" * 10_000) == 60_000
        stream.flush()
    assert stream.encoding == "ascii" and stream.has_lost


def test_a_stream_that_cannot_be_set_takes_any_text():
    class Plain:
        def write(self, text: str) -> None:
            text.encode()
            self.text = text

    stream = SafeStream(Plain())
    assert stream.write("a\udce9") == 2 and stream.stream.text == "a\\udce9"
    assert not stream.has_lost


@pytest.mark.parametrize("run, collects", [(run_entry, True), (run_tool, False)])
def test_a_tool_spends_no_time_on_collecting_garbage(run, collects):
    found = []
    exit_code(run, lambda: found.append(gc.isenabled()))
    assert found == [collects]
