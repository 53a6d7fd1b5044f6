"""The prompt syntax: `(word:1.2)`, `[word]`, `BREAK`, read into plain text with weights."""

from __future__ import annotations

import math
import re

STEP = 1.1  # one pair of round brackets multiplies by this, one pair of square brackets divides

# An escaped bracket or backslash, a bracket, a ":1.3)" that closes a round bracket with its weight, or plain text.
_TOKENS = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
_BREAK = re.compile(r"\bBREAK\b")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Read a prompt as pieces of text with weights, in order. Neighbours of equal weight are one piece.

    `(x)` is 1.1, `[x]` 1/1.1, `(x:1.3)` 1.3; nested brackets multiply; a backslash escapes a bracket or a backslash.
    A bracket that is not closed extends to the end; a closing bracket without an opening one is plain text.

    >>> parse_weights("a (cat:1.5) sits")
    [('a ', 1.0), ('cat', 1.5), (' sits', 1.0)]
    """
    pieces: list[tuple[str, float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply_from(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _TOKENS.finditer(prompt):
        token = match.group()
        if len(token) == 2 and token[0] == "\\":
            pieces.append((token[1], 1.0))
        elif token == "(":
            open_round.append(len(pieces))
        elif token == "[":
            open_square.append(len(pieces))
        elif match.group(1) is not None and open_round:
            multiply_from(open_round.pop(), float(match.group(1)))
        elif token == ")" and open_round:
            multiply_from(open_round.pop(), STEP)
        elif token == "]" and open_square:
            multiply_from(open_square.pop(), 1 / STEP)
        else:
            pieces.append((token, 1.0))
    for start in open_round:
        multiply_from(start, STEP)
    for start in open_square:
        multiply_from(start, 1 / STEP)
    return _join_equal(pieces)


def _join_equal(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of equal weight, so that text without brackets is tokenized as a whole."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and math.isclose(joined[-1][1], weight, rel_tol=1e-9):
            joined[-1] = (joined[-1][0] + text, joined[-1][1])
        else:
            joined.append((text, weight))
    return joined


def split_at_breaks(pieces: list[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Split weighted pieces at the word BREAK (capitals, standing alone): one list for each run of chunks."""
    runs: list[list[tuple[str, float]]] = [[]]
    for text, weight in pieces:
        first, *others = _BREAK.split(text)
        runs[-1].append((first, weight))
        runs.extend([(other, weight)] for other in others)
    return runs
