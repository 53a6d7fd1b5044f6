"""A real headless Chromium, driven by selenium: Debian's packages chromium and chromium-driver, or Chrome with its driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Open = Callable[..., Any]


def found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """One browser for all tests that need it; without one they are skipped, and say so."""
    browser, driver = found("chromium", "chromium-browser", "google-chrome", "chrome"), found("chromedriver")
    if not browser or not driver:
        pytest.skip("no browser here: install chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    window.set_script_timeout(20)
    yield window
    window.quit()


@pytest.fixture
def open_page(chromium) -> Open:
    """`open_page(path, width=390, dark=True, language="zh-CN")` gives the browser with the page, from the disk."""

    def open_it(path: Path, width: int = 1280, dark: bool = False, language: str = "en-US") -> Any:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        agent = {"userAgent": "test", "acceptLanguage": language}
        chromium.execute_cdp_cmd("Emulation.setUserAgentOverride", agent)
        chromium.get_log("browser")
        chromium.get(path.resolve().as_uri())
        return chromium

    return open_it
