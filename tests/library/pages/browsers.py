"""Headless browsers for tests. What the tests need is the same of each: `get`, `execute_script`, `title`."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Controls and images that a screen reader could not name.
COUNT_NAMELESS = """return [...document.querySelectorAll('button, a, input, select')].filter(
    (one) => !one.textContent.trim() && !one.getAttribute('aria-label') && !(one.labels || []).length
    && !one.querySelector('img[alt]:not([alt=""])')
).length + [...document.querySelectorAll('img:not([alt])')].length"""


def found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's packages chromium and chromium-driver, or Chrome with its driver; the test is skipped without."""
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
    try:
        yield window
    finally:
        window.quit()


class Firefox:
    """Mozilla's own driver, which needs no program beside the browser."""

    def __init__(self, program: str, language: str, dark: bool) -> None:
        from marionette_driver.marionette import Marionette

        settings = {"intl.accept_languages": language, "layout.css.prefers-color-scheme.content-override": 0 if dark else 1}
        self.driver = Marionette(bin=program, headless=True, prefs=settings, gecko_log=os.devnull)
        self.driver.start_session()
        self.driver.timeout.script = 20

    def get(self, address: str) -> None:
        self.driver.navigate(address)

    def execute_script(self, script: str) -> Any:
        return self.driver.execute_script(script, sandbox=None)

    @property
    def title(self) -> str:
        return self.driver.title

    def narrow(self) -> None:
        """As narrow as Firefox makes a window."""
        self.driver.set_window_rect(width=450, height=844)

    def quit(self) -> None:
        self.driver.delete_session()
        self.driver.cleanup()


@contextmanager
def firefox(language: str = "en-US", dark: bool = False) -> Iterator[Firefox]:
    """Debian's package firefox-esr, or Firefox; the test is skipped without."""
    program = found("firefox-esr", "firefox")
    if not program:
        pytest.skip("no Firefox here: install firefox-esr")
    pytest.importorskip(
        "marionette_driver.marionette",
        reason="Mozilla's driver is not here: it has none for Python 3.13 or macOS",
        exc_type=ImportError,
    )
    window = Firefox(program, language, dark)
    try:
        yield window
    finally:
        window.quit()


def look_as(window: Any, width: int, dark: bool, language: str) -> None:
    """Let Chromium look like a phone, a dark screen, a reader of another language."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    agent = {"userAgent": "test", "acceptLanguage": language}
    window.execute_cdp_cmd("Emulation.setUserAgentOverride", agent)


def save_screenshot(window: Any, path: Path, width: int, height: int) -> None:
    """The top of Chromium's page as a PNG."""
    part = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = window.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": part})
    path.write_bytes(base64.b64decode(shot["data"]))


def wait(window: Any, condition: str) -> None:
    """Until a condition holds on the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(window, 15, 0.05).until(lambda _: window.execute_script(f"return !!({condition})"))


def assert_fits_and_reads(window: Any, word: str, is_chinese: bool) -> None:
    """Nothing is wider than the window, and the page is in the language of the browser. word: one of the Chinese page."""
    assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert window.execute_script("return document.documentElement.lang") == ("zh-Hans" if is_chinese else "en")
    assert (word in window.execute_script("return document.getElementById('page').textContent")) == is_chinese


Open = Callable[..., Any]
