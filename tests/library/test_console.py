from __future__ import annotations

import io
import logging
import sys

import pytest

from library.console import set_up_console
from library.errors import UserError


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    """The console as it was."""
    root, own = logging.getLogger(), logging.getLogger("library")
    before = (root.handlers[:], root.level, own.level)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    yield
    logging.captureWarnings(False)
    root.handlers[:], level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


def test_messages_and_what_is_printed_go_into_the_file(tmp_path, capfd):
    path = tmp_path / "logs" / "run.log"
    set_up_console(None, str(path), False)
    print("plan: 4 steps")
    logging.getLogger("library.data.index").warning("skipped %s", "a.png")
    text = path.read_text(encoding="utf-8")
    assert "INFO plan: 4 steps" in text and "WARNING skipped a.png" in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("level, lines", [("INFO", ["INFO p", "WARNING w"]), ("WARNING", ["WARNING w"]), ("ERROR", [])])
def test_the_level_decides_what_is_shown(tmp_path, level, lines):
    set_up_console(level, str(tmp_path / "log"), False)
    print("p")
    logging.getLogger("library").warning("w")
    assert [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()] == lines


def test_a_level_above_info_silences_what_is_printed(capfd):
    set_up_console("WARNING", None, True)
    print("plan: 4 steps")
    logging.getLogger("library").warning("look out")
    assert capfd.readouterr() == ("", "warning: look out\n")


def test_a_warning_comes_once_and_printed_lines_each_time(tmp_path):
    set_up_console(None, str(tmp_path / "log"), False)
    for _ in range(3):
        logging.getLogger("library.data").warning("the same")
        print("saved")
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert text.count("the same") == 1 and text.count("saved") == 3


def test_terminals_get_colours_unless_simple(capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    set_up_console(None, None, False)
    assert type(logging.getLogger().handlers[0]).__name__ == "RichHandler"
    set_up_console(None, None, True)
    assert type(logging.getLogger().handlers[0]) is logging.StreamHandler


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="--console_log_file .*choose another file"):
        set_up_console(None, str(tmp_path / "file" / "log"), False)


def test_a_log_file_on_a_full_disk_is_given_up_in_one_line(tmp_path, capfd):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    set_up_console(None, str(tmp_path / "log"), False)
    (handler,) = logging.getLogger().handlers
    handler.stream = Full()
    print("plan: 4 steps")
    logging.getLogger("library").warning("look out")
    first, plan, warning = capfd.readouterr().err.splitlines()
    assert first == f"warning: {tmp_path / 'log'} cannot be written any more: No space left on device; its lines come here"
    assert plan.endswith("INFO plan: 4 steps") and warning.endswith("WARNING look out")


def test_advice_to_install_what_no_run_uses_is_not_shown(capsys):
    set_up_console(None, None, True)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Please make sure you already `pip install kernels`")
    logging.getLogger("bitsandbytes.optim").warning("something else")
    assert capsys.readouterr().err == "warning: something else\n"
