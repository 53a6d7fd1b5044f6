"""A page in a real browser, from the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsers
import pytest


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """One browser for all tests that need it."""
    with browsers.chromium() as window:
        yield window


@pytest.fixture
def open_page(chromium) -> browsers.Open:
    """`open_page(path, width=390, dark=True, language="zh-CN")` gives the browser with the page."""

    def open_it(path: Path, width: int = 1280, dark: bool = False, language: str = "en-US") -> Any:
        browsers.look_as(chromium, width, dark, language)
        chromium.get_log("browser")
        chromium.get(path.resolve().as_uri())
        return chromium

    return open_it
