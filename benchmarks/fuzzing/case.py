"""One input: the program that reads it, its words, and how to see whether something of it was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.fuzzing.outcomes import Main, Outcome, run_program

Lost = Callable[[str], str]  # printed text -> what was lost without a word, or nothing


@dataclass(frozen=True)
class Case:
    """`main` with `words` in `folder`, where the input lies. lost: asked if the program ended well.

    largest_file: bytes that a file may have, as if the disk were full then. must_end_well: whether the input is good.
    """

    main: Main
    words: Sequence[str]
    folder: Path
    lost: Lost | None = None
    stdin: bytes = b""
    largest_file: int | None = None
    must_end_well: bool = False

    def run(self) -> Outcome:
        return run_program(self.main, self.words, self.folder, self.stdin, self.largest_file)

    def silent_loss(self, outcome: Outcome) -> str:
        return self.lost(outcome.text) if self.lost and outcome.ended_well else ""


def training(folder: Path, words: Sequence[str], lost: Lost | None = None, family: str | None = None) -> Case:
    """train_network.py, or sdxl_train_network.py with its family."""
    from library.training.program import main

    return Case(partial(main, family) if family else main, words, folder, lost)
