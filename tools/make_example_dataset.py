"""Rebuild assets/example and assets/example-heldout: 150 + 8 line-art pictures with captions, from a folder of emoji tars.

    python tools/make_example_dataset.py path/to/emoji

The folder holds `captions.tsv` (code point, name, group, keywords) and one tar a style with `<style>/<code point>.webp`.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STYLE = "fluenthc"
TRIGGER = "lineart"  # the word that the LoRA ties the style to; no base style is called so
GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
PICTURES = 150
HELD_OUT = ("penguin", "elephant", "strawberry", "hamburger", "guitar", "key", "rocket", "sailboat")
# Names that say nothing about the picture, or near twins of a held-out picture.
UNCLEAR = {
    "black nib", "card index", "chart decreasing", "chart increasing", "cigarette", "control knobs", "cyclone", "fast food", "high voltage",
    "hot beverage", "japanese castle", "level slider", "love hotel", "national park", "old key", "seat", "wedding",
}  # fmt: skip
SINGULAR_ENDINGS = ("os", "ss", "us")
UNCOUNTED = {
    "bacon", "bread", "broccoli", "butter", "cooked rice", "coral", "curry rice", "fire", "garlic", "mount fuji", "popcorn", "sake",
    "salt", "shaved ice", "soap", "spaghetti", "sushi",
}  # fmt: skip


def caption_of(name: str) -> str:
    """The training caption of one picture.

    >>> caption_of("ear of corn")
    'a lineart emoji of an ear of corn'
    >>> caption_of("grapes")
    'a lineart emoji of grapes'
    """
    plural = name.endswith("s") and not name.endswith(SINGULAR_ENDINGS)
    article = "" if plural or name in UNCOUNTED else "an " if name[0] in "aeio" else "a "
    return f"a {TRIGGER} emoji of {article}{name}"


def names_by_group(folder: Path) -> dict[str, dict[str, str]]:
    """Group -> {name: code point} of short, clear names that every style of the folder has a picture of."""
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


def write_pictures(tar: tarfile.TarFile, codes: dict[str, str], folder: Path) -> None:
    """`<name>.webp`, byte for byte as in the tar, and `<name>.txt` with its caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, code in codes.items():
        stem = name.replace(" ", "-")
        (folder / f"{stem}.webp").write_bytes(tar.extractfile(f"{STYLE}/{code}.webp").read())
        (folder / f"{stem}.txt").write_text(caption_of(name) + "\n", encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("emoji", type=Path, help="folder with captions.tsv and the tars of the styles")
    folder = parser.parse_args().emoji
    if not (folder / f"{STYLE}.tar").is_file():
        print(f"error: {folder / STYLE}.tar is missing; give the folder that holds captions.tsv and {STYLE}.tar", file=sys.stderr)
        return 2

    training, held_out = {}, {}
    for number, names in enumerate(names_by_group(folder).values()):
        held_out |= {name: code for name, code in names.items() if name in HELD_OUT}
        left = {name: code for name, code in names.items() if name not in HELD_OUT}
        share = (PICTURES + number) // len(GROUPS)  # adds up to PICTURES
        training |= {name: left[name] for name in spread(list(left), share)}
    with tarfile.open(folder / f"{STYLE}.tar") as tar:
        write_pictures(tar, training, ROOT / "assets" / "example" / TRIGGER)
        write_pictures(tar, {name: held_out[name] for name in HELD_OUT}, ROOT / "assets" / "example-heldout")
    print(f"{len(training)} training pictures, {len(held_out)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
