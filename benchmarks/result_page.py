"""A page of results in parts or in tables, of which a script may measure some and keep the others."""

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


class Tables:
    """A page of tables. A row is written when it is measured, in place of the same one of an earlier run.

    The first cell names a row. intro: the lines above the tables. heads: the two lines above the rows of each table.
    """

    def __init__(self, path: Path, intro: Sequence[str], heads: Mapping[str, Sequence[str]]) -> None:
        self.path, self.intro, self.heads = path, intro, heads
        self.rows: dict[str, dict[str, str]] = {table: {} for table in heads}
        table = ""
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            table = next((name for name, head in heads.items() if line == head[0]), table if line else "")
            if table and line.startswith("| ") and line != heads[table][0]:
                self.rows[table][line.split(" | ")[0]] = line

    def add(self, table: str, row: str) -> None:
        print(row, flush=True)
        self.rows[table][row.split(" | ")[0]] = row
        lines = list(self.intro)
        for name, rows in self.rows.items():
            lines += ["", *self.heads[name], *rows.values()] if rows else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([*lines, ""]), encoding="utf-8")
