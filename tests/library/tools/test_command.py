"""How the LoRA tools' processes end. test_merge_lora.py has one that runs as people run it."""

from __future__ import annotations

import os
import sys
from io import StringIO

import pytest

from library.errors import UserError
from library.tools.command import Parser, run


class Left(BaseException):
    """In place of the end of the process."""


class Gone(StringIO):
    """A stream whose reader is gone."""

    def flush(self) -> None:
        raise BrokenPipeError


def exit_code(main, monkeypatch) -> int:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # run sets it for good
    with pytest.raises(Left) as left:
        run(main)
    return left.value.args[0]


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("error, code, line", [
    (UserError("a file\nis wrong"), 2, "error: a file is wrong\n"), (KeyboardInterrupt(), 130, "interrupted\n"),
])  # fmt: skip
def test_exit_codes(error, code, line, monkeypatch, capsys):
    assert exit_code(raising(error), monkeypatch) == code
    assert capsys.readouterr().err == line


def test_what_nobody_could_read_is_no_success(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert exit_code(lambda: print("saved"), monkeypatch) == 120
    assert exit_code(raising(UserError("wrong")), monkeypatch) == 2


def test_negative_numbers_in_any_notation_are_values_and_no_options():
    parser = Parser("x")
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--lbw", nargs="*")
    args = parser.parse_args(
        ["--ratios", "-.5", "-5e-1", "-1E-3", "-2.", "-1_0", "0.5", "-inf", "--lbw", "-1,0.5,-1e-2", "-0.5,1"]
    )
    assert args.ratios == [-0.5, -0.5, -0.001, -2.0, -10.0, 0.5, float("-inf")]
    assert args.lbw == ["-1,0.5,-1e-2", "-0.5,1"]
    with pytest.raises(UserError, match="did you mean '--ratios'"):
        parser.parse_args(["--ratio", "-.5"])
