"""A prompt as somebody wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WrittenPrompt:
    """A prompt with its in-line options, and `where` it was written, for error messages: `prompts.txt, line 3`, say.

    columns: where alternatives were chosen, the column of every character in the line as it was written, from 1.
    source: the image that it was read from; its negative prompt comes from there too, and it has no in-line options.
    """

    text: str
    where: str
    columns: tuple[int, ...] | None = None
    negative_prompt: str = ""
    source: Path | None = None
