from __future__ import annotations

import pytest

from library.models.prompt_weights import parse_weights, split_at_breaks


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("(x)", [("x", 1.1)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x: .5 ) y", [("x", 0.5), (" y", 1)]),
        ("((x))", [("x", 1.21)]),
        ("([x])", [("x", 1)]),
        ("(a (b:1.2) c:1.5)", [("a ", 1.5), ("b", 1.8), (" c", 1.5)]),
        (r"\(a\) \[b\] \\ (c)", [("(a) [b] \\ ", 1), ("c", 1.1)]),
        (r"a\b", [(r"a\b", 1)]),
        ("a (b c", [("a ", 1), ("b c", 1.1)]),
        ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("a :1.5) b", [("a :1.5) b", 1)]),
        ("time 12:30 (x:y)", [("time 12:30 ", 1), ("x:y", 1.1)]),
        ("(x:1.3", [("x:1.3", 1.1)]),
        ("(x:-1)", [("x", -1)]),
        ("a (b:1.0) c", [("a b c", 1)]),
    ],
)
def test_syntax(prompt, expected):
    pieces = parse_weights(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


def test_breaks_stand_alone_and_are_capitals():
    pieces = parse_weights("a BREAK (b BREAK c:2)")
    assert split_at_breaks(pieces) == [[("a ", 1.0)], [(" ", 1.0), ("b ", 2.0)], [(" c", 2.0)]]
    assert split_at_breaks(parse_weights("break BREAKFAST")) == [[("break BREAKFAST", 1.0)]]
