"""Prompts with alternatives: `a {red|blue} house` is a red or a blue one.

    {a|b|c}             one of them at random, for each image anew
    {2$$a|b|c}          two different ones, joined with ", "
    {1-2$$a|b|c}        one or two
    {2$$ and $$a|b|c}   joined with " and "
    {e$$a|b|c}          an image for each; {e$$2$$a|b|c} for each pair in order; several of them: all combinations

They do not nest, and a brace that is never closed is ordinary text. In-line options may stand inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from random import Random

from library.errors import UserError
from library.generation.prompts.written import WrittenPrompt

JOINER = ", "
_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^{}]*\{[^{}]*\}[^{}]*\}")
_RULE = re.compile(r"(?P<each>e\$\$)?(?:(?P<least>\d+)(?:-(?P<most>\d+))?\$\$(?:(?P<joiner>[^|$]+)\$\$)?)?")


@dataclass(frozen=True)
class Piece:
    """A part of a line and its column there, from 1."""

    text: str
    column: int


@dataclass(frozen=True)
class Choice:
    """One pair of braces: `least` to `most` of the alternatives, at random, or (`each`) every such selection in turn."""

    alternatives: tuple[Piece, ...]
    least: int
    most: int
    joiner: str
    each: bool
    column: int

    def selections(self) -> Iterator[tuple[Piece, ...]]:
        """Every selection, small ones first, in the order of the line."""
        for count in range(self.least, self.most + 1):
            yield from combinations(self.alternatives, count)

    def draw(self, random: Random) -> tuple[Piece, ...]:
        """One selection at random."""
        return tuple(random.sample(self.alternatives, random.randint(self.least, self.most)))

    def joined(self, selection: tuple[Piece, ...]) -> list[Piece]:
        """The selection with the joining text between."""
        pieces = [part for piece in selection for part in (Piece(self.joiner, self.column), piece)]
        return pieces[1:]


class Template:
    """A prompt read into text and choices. Raises `UserError` naming `where` and column."""

    def __init__(self, written: WrittenPrompt) -> None:
        self.written = written
        line, where = written.text, written.where
        self.parts: list[Piece | Choice] = []
        nested = _NESTED.search(line)
        if nested:
            raise UserError(f"{where}, column {nested.start() + 1}: alternatives in braces do not nest; write out the inner ones")
        end = 0
        for braces in _BRACES.finditer(line):
            self.parts.append(Piece(line[end : braces.start()], end + 1))
            self.parts.append(_read_choice(braces, where))
            end = braces.end()
        self.parts.append(Piece(line[end:], end + 1))

    @property
    def enumerates(self) -> bool:
        """Whether the line itself sets the number of its images, by {e$$...}."""
        return any(isinstance(part, Choice) and part.each for part in self.parts)

    def prompts(self, count: int, random: Random) -> list[WrittenPrompt]:
        """The prompt of each of `count` images, or, if it enumerates, one for every combination."""
        axes = [list(part.selections()) for part in self.parts if isinstance(part, Choice) and part.each]
        rounds = product(*axes) if axes else [()] * count
        return [self._chosen(iter(selections), random) for selections in rounds]

    def _chosen(self, selections: Iterator[tuple[Piece, ...]], random: Random) -> WrittenPrompt:
        pieces: list[Piece] = []
        for part in self.parts:
            if isinstance(part, Piece):
                pieces.append(part)
            else:
                pieces += part.joined(next(selections) if part.each else part.draw(random))
        columns = tuple(piece.column + offset for piece in pieces for offset in range(len(piece.text)))
        return replace(self.written, text="".join(piece.text for piece in pieces), columns=columns)


def _read_choice(braces: re.Match[str], where: str) -> Choice:
    body, column = braces.group(1), braces.start() + 1
    rule = _RULE.match(body)
    assert rule is not None  # all of it is optional
    words, start = body[rule.end() :], column + 1 + rule.end()
    if "$$" in words:
        known = "{a|b}, {2$$a|b|c}, {2$$ and $$a|b} or {e$$a|b}"
        raise UserError(f"{where}, column {column}: {braces.group()} is not understood; write {known}")
    alternatives = []
    for word in words.split("|"):
        alternatives.append(Piece(word, start))
        start += len(word) + 1
    least = int(rule["least"] or 1)
    most = int(rule["most"] or least)
    if not 1 <= least <= most <= len(alternatives):
        asked = f"{least} to {most}" if most != least else str(least)
        raise UserError(f"{where}, column {column}: {braces.group()} asks for {asked} of {len(alternatives)} alternatives")
    return Choice(tuple(alternatives), least, most, rule["joiner"] or JOINER, bool(rule["each"]), column)
