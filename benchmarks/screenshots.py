r"""Screenshots of pages for docs/images, by a headless Chromium (Debian's packages chromium and chromium-driver).

    python benchmarks/screenshots.py output/run/mine.html docs/images/run-page.webp

The commands of all images; `$` stands before what is typed in the project's folder:

run-page.webp, running-page.webp (the page while it goes on, at about half of the steps, and the page at the end):

    $ mkdir -p output
    $ printf "a lineart emoji of %s --d 1 --s 20 --l 4\n" "a cat" "a penguin" "an elephant" "a guitar" > output/prompts.txt
    $ accelerate launch --num_cpu_threads_per_process 1 train_network.py --pretrained_model_name_or_path=assets/base-model
      --dataset_config=assets/example/dataset.toml --output_dir=output/run --output_name=lineart --network_module=networks.lora
      --network_dim=32 --network_alpha=32 --learning_rate=2e-3 --lr_scheduler=cosine --max_train_steps=160 --validation_split=0.1
      --validate_every_n_steps=40 --sample_prompts=output/prompts.txt --sample_every_n_steps=20 --sample_at_first --seed=1
    $ python benchmarks/screenshots.py output/run/lineart.html docs/images/run-page.webp --size 1280 1560

dataset-page.webp (the images that are worth a look):

    $ python benchmarks/dataset_with_faults.py output/faults
    $ accelerate launch --num_cpu_threads_per_process 1 train_network.py --pretrained_model_name_or_path=assets/base-model
      --dataset_config=output/faults/data.toml --output_dir=output/faults --network_module=networks.lora --masked_loss --seed=1
      --debug_dataset
    $ python benchmarks/screenshots.py output/faults/debug_dataset.html docs/images/dataset-page.webp --size 1280 1400
      --script "const c = document.getElementById('problem'); c.value = 'any'; c.dispatchEvent(new Event('change'))"

self-test.webp (the table, from a text file; it stands as text in docs/train_network_README.md too):

    $ python tools/doctor.py --self_test | sed -n "/^Self test/,$ p" > output/self-test.txt
    $ python benchmarks/screenshots.py output/self-test.txt docs/images/self-test.webp --size 1120 430 --width 1120
      --script "document.body.style = 'margin: 24px; background: #1e2227; color: #dfe3e8; font-size: 15px; line-height: 1.5'"

demo-sheet.webp is output/demo/contact-sheet.png of `python quickstart.py`, and base-model-sheet.webp a sheet of
assets/make/base_model.py; both are saved as WebP.
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
