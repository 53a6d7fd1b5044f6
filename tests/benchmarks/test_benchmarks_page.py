"""benchmarks/README.md names every script that there is."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_page_lists_every_script():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"^\| `python benchmarks/(\w+\.py)", page, re.MULTILINE)) == scripts
    assert all((FOLDER / link).exists() for link in re.findall(r"\]\(([^)]+)\)", page))
