"""From the tars of the emoji styles to folders of images with captions, one folder a style."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from assets.make.names import AUTOENCODER_STYLES, NAMES, STYLES, prompt_of
from library.errors import UserError

KEYWORDS = 3  # at most so many after the name


@dataclass(frozen=True)
class Emoji:
    code: str  # code point, which names the image's file
    name: str
    group: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """Images by style and code point in folders below `folder`, as `unpack` made them."""

    source: Path  # holds captions.tsv
    folder: Path

    def files(self, style: str) -> list[Path]:
        return sorted((self.folder / "all" / style).glob("*.webp"))

    def groups(self) -> dict[str, str]:
        """Code point -> group."""
        return {emoji.code: emoji.group for emoji in self.emoji.values()}

    @property
    def named(self) -> Path:
        """The folder of captioned images, one folder a style: those of `names.py`."""
        return self.folder / "named"

    @cached_property
    def emoji(self) -> dict[str, Emoji]:
        """Name -> emoji, from `captions.tsv`: code point, name, group, keywords."""
        found = {}
        with open(self.source / "captions.tsv", encoding="utf-8", newline="") as file:
            for code, name, group, keywords in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                words = (word.strip() for word in keywords.split(","))
                plain = tuple(word for word in words if word.isascii() and word.replace(" ", "").isalpha() and word != name)
                found[name.lower()] = Emoji(code, name.lower(), group, plain[:KEYWORDS])
        return found


def unpack(source: Path, folder: Path) -> Images:
    """Write every image below `folder`/all, and those of `names.py` with captions below `folder`/named.

    `source` holds `captions.tsv` and one tar a style. What is there already is kept, so a second call costs nothing.
    """
    for name in ("captions.tsv", *(f"{style}.tar" for style in AUTOENCODER_STYLES)):
        if not (source / name).is_file():
            raise UserError(f"{source / name} is missing; give --images the folder with captions.tsv and the styles' tars")
    images = Images(source, folder)
    whole = folder / "whole"  # written last, so a break leaves nothing half done
    if whole.exists():
        return images
    shutil.rmtree(folder, ignore_errors=True)
    for style in AUTOENCODER_STYLES:
        _unpack_tar(source / f"{style}.tar", folder / "all" / style)
    for word, style in STYLES.items():
        target = images.named / style
        target.mkdir(parents=True)
        for name in (name for names in NAMES.values() for name in names):
            _write_named(images.emoji[name], word, folder / "all" / style, target)
    whole.touch()
    return images


def _unpack_tar(path: Path, target: Path) -> None:
    target.mkdir(parents=True)
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".webp"):
                (target / Path(member.name).name).write_bytes(tar.extractfile(member).read())


def _write_named(emoji: Emoji, style: str, images: Path, target: Path) -> None:
    """The image and its caption: the prompt, then keywords, which training drops at random."""
    stem = emoji.name.replace(" ", "-")
    shutil.copyfile(images / f"{emoji.code}.webp", target / f"{stem}.webp")
    caption = ", ".join([prompt_of(style, emoji.name), *emoji.keywords])
    (target / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


def read_tar(source: Path, style: str, names: list[str]) -> dict[str, Image.Image]:
    """Name -> image of one style, straight from its tar."""
    emoji = Images(source, source).emoji
    with tarfile.open(source / f"{style}.tar") as tar:
        return {name: Image.open(io.BytesIO(tar.extractfile(f"{style}/{emoji[name].code}.webp").read())) for name in names}
