"""A page of results in parts, of which a script may measure some and keep the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def write_parts(path: Path, script: str, about: str, sections: Mapping[str, Sequence[str]]) -> None:
    """Write the page. about: the script's docstring, of which the first two paragraphs are left out. sections: lines by title.

    Parts of an earlier run that are not among the sections stay as they are.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    parts |= {title: "\n" + "\n".join(lines) + "\n" for title, lines in sections.items()}
    intro = f"# benchmarks/{script}\n\n{about.split(chr(10) * 2, 2)[2].strip()}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(intro + "".join(f"\n## {title}\n{text.rstrip()}\n" for title, text in parts.items()), encoding="utf-8")
