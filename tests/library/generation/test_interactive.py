"""library/generation/interactive.py: asking for prompts, and showing what came of them."""

from __future__ import annotations

import builtins
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from library.generation.interactive import ask_for_prompts, show


@pytest.fixture
def typed(monkeypatch):
    def answer(*lines: str, terminal: bool = True):
        answers = iter(lines)

        def read(prompt: str) -> str:
            try:
                return next(answers)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: terminal))

    return answer


def test_lines_until_the_end_and_empty_ones_are_asked_for_again(typed, tmp_path):
    typed("a cat", "", "  ", " a dog --s 3 ")
    assert list(ask_for_prompts(tmp_path / "history")) == ["a cat", "a dog --s 3"]


def test_history_goes_on_from_session_to_session(typed, tmp_path):
    readline = pytest.importorskip("readline")
    readline.clear_history()
    history = tmp_path / "new" / "history"
    readline.add_history("a cat")  # as typing does
    typed("a cat")
    assert list(ask_for_prompts(history)) == ["a cat"] and "a" in history.read_text(encoding="utf-8")
    readline.clear_history()
    typed("b")
    assert list(ask_for_prompts(history)) == ["b"]
    assert readline.get_history_item(1) == "a cat"
    readline.clear_history()


def test_without_readline(typed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "readline", None)
    typed("a cat")
    assert list(ask_for_prompts(tmp_path / "history")) == ["a cat"]
    assert not (tmp_path / "history").exists()


def test_a_pipe_leaves_no_history(typed, tmp_path):
    typed("a cat", terminal=False)
    assert list(ask_for_prompts(tmp_path / "history")) == ["a cat"] and not (tmp_path / "history").exists()


def test_an_image_is_shown_where_there_is_a_screen(monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self) or (_ for _ in ()).throw(RuntimeError("no viewer")))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    show(Image.new("RGB", (8, 8)))
    assert not shown
    monkeypatch.setenv("DISPLAY", ":0")
    show(Image.new("RGB", (8, 8)))  # a viewer that fails is no matter
    assert len(shown) == 1
