"""Good files under odd names, given to every option that takes a path; and paths where no such file is."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from benchmarks.fuzzing.case import Case, training
from benchmarks.fuzzing.options import words_of_a_run
from benchmarks.fuzzing.shelf import Shelf
from library.generation.program import main as draw

# A name on the disk, and as it is given: é in one letter or two, bytes that are no UTF-8, letters that mean something elsewhere.
NAMES = (
    ("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9"), ("cafe\u0301", "cafe\u0301"), ("caf\udce9", "caf\udce9"),
    ("\u65e5\u672c", "\u65e5\u672c"), ("\U0001f600", "\U0001f600"), ("a b", "a b"), ("a'b\"", "a'b\""), ("$HOME", "$HOME"),
    ("%s%d", "%s%d"), ("{a}", "{a}"), ("#a", "#a"), ("a;b=c", "a;b=c"), ("a\u2028b", "a\u2028b"), ("\x1b[2J", "\x1b[2J"),
    ("x" * 200, "x" * 200), ("x.y", "./x.y"),
)  # fmt: skip
DRAWING = ["--outdir=out", "--W=64", "--H=64", "--steps=1"]


def path(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """One option of a program with the path of a good file, or of none."""
    name, typed = rng.choice(NAMES)
    inner, inner_typed = rng.choice((("", ""), rng.choice(NAMES)))
    make = rng.choice((_training, _training, _drawing, _tool))
    kind, suffix, case = make(rng, folder, shelf)
    given = os.path.join(inner_typed, typed + suffix)
    if is_good := rng.random() < 0.8:
        try:
            _put(kind, folder / inner / f"{name}{suffix}", shelf)
        except (OSError, ValueError):  # a file system that does not take such names
            given = f"plain{suffix}"
            _put(kind, folder / given, shelf)
    else:
        given = _wrong(rng, folder, given)
    return case(given, is_good)


Made = tuple[str, str, Callable[[str, bool], Case]]  # kind of file, suffix, and the case for a path and whether it is good


def _training(rng: random.Random, folder: Path, shelf: Shelf) -> Made:
    option, kind, suffix, more = rng.choice((
        ("pretrained_model_name_or_path", "model", ".safetensors", []), ("vae", "model", ".safetensors", []),
        ("network_weights", "lora", ".safetensors", ["--dim_from_weights"]), ("base_weights", "lora", ".safetensors", []),
        ("sample_prompts", "prompts", ".txt", ["--sample_at_first"]), ("metadata_thumbnail", "image", ".png", []),
        ("config_file", "config", ".toml", []), ("train_data_dir", "data", "", []), ("reg_data_dir", "data", "", []),
        ("conditioning_data_dir", "data", "", ["--masked_loss"]), ("logging_dir", "folder", "", []),
    ))  # fmt: skip
    words = words_of_a_run(folder, shelf)
    return kind, suffix, lambda given, good: _must(training(folder, [*words, *more, f"--{option}={given}"]), good)


def _drawing(rng: random.Random, folder: Path, shelf: Shelf) -> Made:
    option, kind, suffix, more = rng.choice((
        ("ckpt", "model", ".safetensors", ["--prompt=a"]), ("from_file", "prompts", ".txt", []),
        ("network_weights", "lora", ".safetensors", ["--prompt=a"]), ("image_path", "image", ".png", ["--prompt=a"]),
        ("lora_dir", "folder", "", ["--prompt=a"]), ("outdir", "folder", "", ["--prompt=a"]),
    ))  # fmt: skip
    words = [f"--ckpt={shelf.model}", *DRAWING, *more]
    return kind, suffix, lambda given, good: _must(Case(draw, [*words, f"--{option}={given}"], folder), good)


def _tool(rng: random.Random, folder: Path, shelf: Shelf) -> Made:
    save_to = "--save_to=out/x.safetensors"
    name, kind, suffix, words = rng.choice((
        ("networks.check_lora_weights", "lora", ".safetensors", ["{}"]),
        ("networks.resize_lora", "lora", ".safetensors", ["--model={}", "--new_rank=1", save_to]),
        ("networks.merge_lora", "lora", ".safetensors", ["--ratios=1", save_to, "--models", "{}"]),
        ("networks.svd_merge_lora", "lora", ".safetensors", ["--ratios=1", save_to, "--models", "{}"]),
        ("tools.convert_diffusers20_original_sd", "model", ".safetensors", ["{}", "out/folder"]),
        ("tools.resize_images_to_resolution", "images", "", ["{}", "out", "--max_resolution=32x32"]),
    ))  # fmt: skip
    main = importlib.import_module(name).main

    def case(given: str, good: bool) -> Case:
        return _must(Case(main, [word.format(given) if word in ("{}", "--model={}") else word for word in words], folder), good)

    return kind, suffix, case


def _must(case: Case, good: bool) -> Case:
    return Case(case.main, case.words, case.folder, must_end_well=good)


def _put(kind: str, place: Path, shelf: Shelf) -> None:
    """A good file or folder of this kind."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("model", "lora"):
        shutil.copy(shelf.model if kind == "model" else shelf.lora_file, place)
    elif kind == "image":
        with open(place, "wb") as file:
            Image.new("RGB", (64, 64), (9, 99, 200)).save(file, "PNG")
    elif kind == "prompts":
        place.write_text("a cat\n", encoding="utf-8")
    elif kind == "config":
        place.write_text("network_alpha = 2\n", encoding="utf-8")
    else:
        place.mkdir(parents=True)
        inner = {"data": place / "1_x", "images": place}.get(kind)
        if inner is not None:
            _put("image", inner / "good.png", shelf)


def _wrong(rng: random.Random, folder: Path, given: str) -> str:
    """A path where no good file is: none, an empty one, one too long, a link to itself, a folder in place of a file."""
    with contextlib.suppress(OSError):  # Windows asks for rights
        (folder / "itself").symlink_to(folder / "itself")
    (folder / "file").write_text("x", encoding="utf-8")
    (folder / "empty").mkdir()
    return rng.choice((given, "", " ", "itself", "itself/x", "file", "file/x", "empty", "x" * 300, "."))
