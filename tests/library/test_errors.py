from __future__ import annotations

import logging
import os

import pytest

from library.errors import PatientStream, Problems, RunFailed, UserError, nearest, run_entry, unknown


@pytest.mark.parametrize("name, close", [("network_dm", "network_dim"), ("Network_Dim", "network_dim"), ("xyz", None)])
def test_nearest(name, close):
    assert nearest(name, ["network_dim", "network_alpha"]) == close


def test_unknown_lists_what_is_known_if_nothing_is_close():
    assert str(unknown("key", "zzz", ["b", "a"], "file.toml")) == "unknown key 'zzz' in file.toml; known: a, b"


@pytest.mark.parametrize(
    "raised, code, words",
    [(UserError("a\nb"), 2, "error: a b"), (RunFailed("nan"), 1, "error: nan"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_an_entry_ends_in_one_line_and_an_exit_code(capsys, raised, code, words):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() == words


def test_output_into_a_closed_pipe_or_an_old_console_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    stream = PatientStream(open(write, "w", encoding="ascii"))  # noqa: SIM115  (closing it would fail)
    for _ in range(3):
        assert stream.write("größe\n" * 10_000) == 60_000
        stream.flush()
    assert stream.encoding == "ascii"


def test_an_entry_passes_its_code_on_and_lets_bugs_show():
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: 3)
    assert ended.value.code == 3
    with pytest.raises(ZeroDivisionError):
        run_entry(lambda: 1 / 0)


def test_what_is_no_unicode_or_steers_the_terminal_is_written_out(capsys):
    def main():
        logging.getLogger("library").warning("a\udce9 \x1b[2J")
        raise UserError("b\udce9 \x1b[2J")

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        with pytest.raises(SystemExit):
            run_entry(main)
    finally:
        root.handlers = handlers
    assert capsys.readouterr().err.splitlines() == ["warning: a\ufffd \\x1b[2J", "error: b\ufffd \\x1b[2J"]


def test_a_stream_that_cannot_be_set_takes_any_text():
    class Plain:
        def write(self, text: str) -> None:
            text.encode()
            self.text = text

    stream = PatientStream(Plain())
    assert stream.write("a\udce9") == 2 and stream.stream.text == "a\\udce9"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "shut/a"), OSError(36, "Name too long", "shut/a")])
def test_a_path_that_cannot_be_looked_at_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: shut/a: {error.strerror}; check")
    problems = Problems()
    assert problems.of(main) is None and problems.found[0].startswith("shut/a: ")
    with pytest.raises(OSError):
        Problems().of(lambda: (_ for _ in ()).throw(OSError("a bug")))
