"""One HTML file that holds its style, its program and its data; images and the chart's script lie in one folder beside it.

All that comes from users reaches the page as JSON and is shown as text, so nothing in it can become markup or run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from library.files import write_text
from library.safe_text import as_data

ASSETS = Path(__file__).parent / "assets"


def write_page(path: Path, kind: str, title: str, data: Mapping[str, Any]) -> None:
    """Write a page atomically. kind: the name of its program in `assets`, such as "run". data: for JSON.

    Raises UserError if the file cannot be written.
    """
    program = "".join(asset(name) for name in ("words.js", "common.js", f"{kind}.js"))
    write_text(path, Template(asset("page.html")).substitute(
        title=html.escape(title), style=asset("page.css"), data=as_json(data), program=program
    ))  # fmt: skip


def asset(name: str) -> str:
    """The text of a file in `assets`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def as_json(data: Mapping[str, Any]) -> str:
    """Data that may stand inside a <script> element: no text in it can end the element."""
    return json.dumps(as_data(data), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def folder_of(page: Path) -> Path:
    """The one folder that belongs to a page: `mine.html` and `mine-page/`."""
    return page.with_name(f"{page.stem}-page")
