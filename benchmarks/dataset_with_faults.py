"""A dataset of the shipped line drawings with masks, captions that vary, and slips that people make.

    python benchmarks/dataset_with_faults.py output/faults

It is what docs/images/dataset-page.webp shows; benchmarks/screenshots.py has all commands.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image

DRAWINGS = Path(__file__).resolve().parent.parent / "assets" / "example" / "lineart"
COUNT = 50
SIDE = 256  # pixels
TAGS = "white background, black ink, centred, line art, simple shapes"
KINDS, THINGS = ("bold", "thin", "round", "even", "clean"), ("outline", "stroke", "curve", "corner", "contour", "hatching")
DATASET = """[general]
caption_extension = ".txt"

[[datasets]]
resolution = 256
batch_size = 4

  [[datasets.subsets]]
  image_dir = "lineart"
  conditioning_data_dir = "masks"
  num_repeats = 4
  shuffle_caption = true
  keep_tokens = 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="it must not be there yet")
    folder = parser.parse_args().folder
    images, masks = folder / "lineart", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    (folder / "data.toml").write_text(DATASET, encoding="utf-8")
    for path in sorted(DRAWINGS.glob("*.webp"))[:COUNT]:
        with Image.open(path) as image:
            image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(images / f"{path.stem}.png")
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip().replace("a lineart emoji of ", "")
        (images / f"{path.stem}.txt").write_text(f"{caption}, {TAGS}", encoding="utf-8")
    add_slips(images)
    mask = soft_circle(SIDE)
    for path in images.glob("*.png"):
        with Image.open(path) as image:
            mask.resize(image.size).save(masks / path.name)


def add_slips(images: Path) -> None:
    """A caption that is too long, an empty one, an image that is cut much, a small one, and one that is there twice."""
    long = ", ".join(f"{kind} {thing}" for kind in KINDS for thing in THINGS)
    (images / "alarm-clock.txt").write_text(f"an alarm clock, {TAGS}, {long}", encoding="utf-8")
    (images / "backpack.txt").write_text("\n", encoding="utf-8")
    with Image.open(images / "automobile.png") as image:
        wide = Image.new("RGB", (5 * SIDE // 2, SIDE), "white")
        wide.paste(image, (3 * SIDE // 4, 0))
    wide.save(images / "automobile.png")
    with Image.open(images / "cloud.png") as image:
        small = image.resize((SIDE // 3, SIDE // 3))
    small.save(images / "cloud.png")
    for suffix in (".png", ".txt"):
        shutil.copyfile(images / f"banana{suffix}", images / f"banana-copy{suffix}")


def soft_circle(side: int) -> Image.Image:
    """White in the middle, black in the corners, with a soft edge."""
    return Image.radial_gradient("L").resize((side, side)).point(lambda distance: max(0, min(255, (170 - distance) * 8)))


if __name__ == "__main__":
    main()
