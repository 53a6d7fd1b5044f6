"""Inputs of the data pipeline: images, captions, files that describe data sets."""

from __future__ import annotations

import io
import json
import random
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.case import Case, training
from benchmarks.fuzzing.shelf import Shelf
from library.data.config_keys import DATASET_KEYS, SHARED_KEYS, SUBSET_ONLY
from library.safe_text import on_terminal

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "YCbCr", "HSV", "LAB")
KINDS = {
    "png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "avif": "AVIF", "ppm": "PPM",
    "ico": "ICO", "jp2": "JPEG2000",
}  # fmt: skip
# Options that change captions from use to use.
CHANGING = (
    "--shuffle_caption", "--keep_tokens=1", "--keep_tokens_separator=|||", "--caption_dropout_rate=0.5", "--caption_prefix=p",
    "--caption_tag_dropout_rate=0.5", "--enable_wildcard", "--secondary_separator=;;", "--caption_separator=;",
    "--weighted_captions", "--max_token_length=150", "--token_warmup_step=2",
)  # fmt: skip
DEBUG = (
    "--pretrained_model_name_or_path=x",
    "--network_module=networks.lora",
    "--debug_dataset",
    "--resolution=64",
    "--output_dir=out",
    "--caption_extension=.txt",
    "--seed=1",
)


def image(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """An image of any kind and mode, damaged in half of the cases, beside a good one."""
    data = folder / "data" / "1_x"
    good_image(data)
    suffix = rng.choice(list(KINDS))
    content = encoded_image(rng, KINDS[suffix])
    if rng.random() < 0.5:
        content = mutations.damaged(rng, content)
    if rng.random() < 0.1:
        suffix = rng.choice(list(KINDS))
    (data / f"odd.{suffix}").write_bytes(content)
    words = [*DEBUG, "--train_data_dir=data", f"--on_bad_image={rng.choice(('refuse', 'skip'))}"]
    words += mutations.some(rng, ("--alpha_mask", "--flip_aug", "--enable_bucket", "--color_aug", "--random_crop"), 2)
    return training(folder, words, lost=lambda text: "" if f"odd.{suffix}" in text else f"odd.{suffix} is neither used nor named")


def encoded_image(rng: random.Random, kind: str) -> bytes:
    """An image of random mode and size as a file of this kind; RGB where the kind has no such mode."""
    size = rng.choice(((1, 1), (1, 40), (40, 1), (3, 200), (16, 16), (64, 64), (65, 33), (120, 90)))
    shown = Image.fromarray(np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3))
    options: dict[str, Any] = {}
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [shown.rotate(180)]}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(0, 12)  # orientation, also those that do not exist
        options["exif"] = exif
    if rng.random() < 0.1:
        options["icc_profile"] = rng.randbytes(rng.randrange(200))
    buffer = io.BytesIO()
    try:
        shown.convert(rng.choice(MODES)).save(buffer, kind, **options)
    except (OSError, ValueError, KeyError, TypeError):
        buffer = io.BytesIO()
        shown.save(buffer, kind)
    return buffer.getvalue()


def good_image(folder: Path) -> None:
    """A folder with one image and its caption."""
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(_plain_png())
    (folder / "good.txt").write_text("good", encoding="utf-8")


@cache
def _plain_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def caption(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A caption file of any text in any encoding, with options that change captions in half of the cases."""
    data = folder / "data" / "1_x"
    data.mkdir(parents=True)
    (data / "odd.png").write_bytes(_plain_png())
    lines = [mutations.text(rng) if rng.random() < 0.6 else "a red car, outdoors" for _ in range(rng.randrange(1, 4))]
    text = rng.choice(("\n", "\n\n", ", ")).join(lines)
    content = mutations.encoded(rng, text)
    is_damaged = rng.random() < 0.25
    (data / "odd.txt").write_bytes(mutations.damaged(rng, content) if is_damaged else content)
    words = [*DEBUG, "--train_data_dir=data"]
    changing = mutations.some(rng, CHANGING, 4) if rng.random() < 0.5 else []
    is_plain = not is_damaged and not changing
    return training(folder, words + changing, lost=partial(_caption_is_lost, text) if is_plain else None)


def _caption_is_lost(text: str, printed: str) -> str:
    """Whether the first line that is not blank is not what is trained, and nothing is said."""
    wanted = next((line.strip() for line in re.split("\r\n|\n|\r", text.lstrip("\ufeff")) if line.strip()), "")
    found = re.search(r"^    caption: (.*)$", printed, re.MULTILINE)
    is_said = "half an emoji" in printed or "no UTF-8" in printed
    return "" if is_said or (found and found[1] == repr(wanted)) else f"wanted {wanted[:80]!r}, shown {found and found[1][:80]}"


def metadata_file(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A .json or .jsonl of captions, with odd keys and values, for two images."""
    data = folder / "data"
    data.mkdir()
    for name in ("a.png", "b.png"):
        (data / name).write_bytes(_plain_png())
    entries: dict[Any, Any] = {name: {"caption": "a car", "tags": "red, car"} for name in ("a.png", "b")}
    for _ in range(rng.randrange(4)):
        accident = rng.randrange(4)
        name = rng.choice(list(entries))
        if accident == 0:
            entries[name] = rng.choice(mutations.ODD_VALUES)
        elif accident == 1 and isinstance(entries[name], dict):
            entries[name][rng.choice(("caption", "tags", "image_size", "train_resolution", "x"))] = rng.choice(
                mutations.ODD_VALUES
            )
        elif accident == 2:
            entries[mutations.text(rng)] = {"caption": mutations.text(rng)}
        else:
            entries[rng.choice(("a", "a.jpg", "data/a.png", "B.PNG"))] = {"caption": "again"}
    is_lines = rng.random() < 0.4
    text = json.dumps(entries, ensure_ascii=rng.random() < 0.5)
    if is_lines:
        records = (
            {**(value if isinstance(value, dict) else {"caption": value}), "image_path": key} for key, value in entries.items()
        )
        text = "\n".join(json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records)
    if rng.random() < 0.3:
        text = mutations.damaged_text(rng, text)
    content = mutations.encoded(rng, text)
    if rng.random() < 0.2:
        content = mutations.damaged(rng, content)
    name = "meta.jsonl" if is_lines else "meta.json"
    (folder / name).write_bytes(content)
    return training(folder, [*DEBUG, "--train_data_dir=data", f"--in_json={name}"])


def dataset_config(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A dataset file, TOML or JSON, with odd keys and values."""
    data = folder / "data"
    good_image(data)
    unknown = ""
    subset: dict[str, Any] = {"image_dir": "data", "caption_extension": ".txt"}
    dataset: dict[str, Any] = {"resolution": 64, "batch_size": 1, "subsets": [subset]}
    general: dict[str, Any] = {}
    for _ in range(rng.randrange(5)):
        table = rng.choice((subset, dataset, general))
        key = rng.choice((*DATASET_KEYS, *SHARED_KEYS, *SUBSET_ONLY))
        if rng.random() < 0.15:
            key = unknown = mutations.misspelt(rng, key)
        table[key] = rng.choice(mutations.ODD_VALUES)
    config = {"general": general, "datasets": [dataset]}
    name, is_damaged = write_config(rng, folder, "data", config)
    words = [*DEBUG, f"--dataset_config={name}"]
    return training(folder, words, lost=None if is_damaged or not unknown else partial(is_passed_over, unknown))


def is_passed_over(key: str, printed: str) -> str:
    """Whether a key that does not exist is taken without a word."""
    return "" if on_terminal(key) in printed or key in printed else f"unknown key {key!r} is passed over"


def write_config(rng: random.Random, folder: Path, stem: str, config: dict[str, Any]) -> tuple[str, bool]:
    """Write it as TOML or JSON, now and then damaged. Returns the file's name, and whether it is damaged."""
    is_json = rng.random() < 0.3
    text = json.dumps(config) if is_json else as_toml(config)
    is_damaged = rng.random() < 0.3
    if is_damaged:
        text = mutations.damaged_text(rng, text)
    name = f"{stem}.{'json' if is_json else 'toml'}"
    (folder / name).write_bytes(mutations.encoded(rng, text) if is_damaged else text.encode("utf-8", "surrogatepass"))
    return name, is_damaged


def as_toml(config: dict[str, Any]) -> str:
    """TOML of tables of plain values; what TOML does not have (null) is left out."""
    lines: list[str] = []
    _table(config, (), lines)
    return "\n".join(lines) + "\n"


def _table(table: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    inner = {key: value for key, value in table.items() if _is_table_or_list_of(value)}
    lines += [f"{_key(key)} = {_value(value)}" for key, value in table.items() if key not in inner and value is not None]
    for key, value in inner.items():
        here = (*path, key)
        for entry in value if isinstance(value, list) else [value]:
            name = ".".join(map(_key, here))
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            _table(entry, here, lines)


def _is_table_or_list_of(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
    )


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(entry) for entry in value if entry is not None)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_value(entry)}' for key, entry in value.items() if entry is not None)}}}"
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else str(value)
    return json.dumps(value, ensure_ascii=False)
