"""Screenshots of pages for docs/images, by a headless Chromium (Debian's packages chromium and chromium-driver).

    python benchmarks/screenshots.py output/run/mine.html docs/images/run-page.webp

Of a run that still goes on, take the page while it does.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import time
from pathlib import Path

from PIL import Image

SECONDS_TO_DRAW = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path, help=".webp, or .png for a look")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 900), help="pixels of the page that are seen")
    parser.add_argument("--width", type=int, default=960, help="pixels of the image")
    parser.add_argument("--language", default="en-US")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--script", default="", help="JavaScript to run before, such as a filter to set or a place to scroll to")
    args = parser.parse_args()
    shot = take(args.page, tuple(args.size), args.language, args.dark, args.script)
    shot.thumbnail((args.width, 10 * args.width), Image.Resampling.LANCZOS)
    shot.convert("RGB").save(args.image, quality=80, method=6)
    print(f"{args.image}: {shot.width} x {shot.height}, {args.image.stat().st_size / 1000:.0f} kB")


def take(page: Path, size: tuple[int, int], language: str, dark: bool, script: str) -> Image.Image:
    """What a window of this size shows, in (width, height) pixels."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    window = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or ""))
    try:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        window.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": "screenshots", "acceptLanguage": language})
        window.get(page.resolve().as_uri())
        time.sleep(SECONDS_TO_DRAW)
        window.execute_script(script)
        time.sleep(SECONDS_TO_DRAW / 2)
        return Image.open(io.BytesIO(base64.b64decode(window.get_screenshot_as_base64())))
    finally:
        window.quit()


if __name__ == "__main__":
    main()
