"""The tree passes the checks of pyproject.toml, with the versions that requirements-test.txt pins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_check(words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["library", "networks", "tools"])
def test_an_editable_install_has_every_folder(name):
    """setuptools takes only folders with an __init__.py for packages."""
    folders = {path.parent for path in (ROOT / name).rglob("*.py")}
    assert folders and not [folder for folder in folders if not (folder / "__init__.py").exists()]
