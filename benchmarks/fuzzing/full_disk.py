"""Programs that write on a disk which is full: no file may become larger than a limit, so that each writer fails in turn."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.case import Case, Lost, training
from benchmarks.fuzzing.options import words_of_a_run
from benchmarks.fuzzing.shelf import Shelf
from library.generation.program import main as draw

LIMITS = (0, 1, 100, 1_000, 4_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)  # bytes
# What a training writes beside its LoRA.
ALSO_WRITTEN = (
    ("--save_state",), ("--save_state_on_train_end",), ("--save_every_n_steps=1",), ("--logging_dir=logs",),
    ("--console_log_file=run.log",), ("--save_model_as=ckpt",), ("--cache_latents_to_disk",), ("--validation_split=0.5",),
    ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"), ("--output_config", "--config_file=o.toml"),
    ("--debug_dataset",), ("--sample_prompts=prompts.txt", "--sample_every_n_steps=1"),
)  # fmt: skip


def full_disk(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A whole run of a program, none of whose files may be larger than a limit."""
    make = rng.choice((_training, _training, _drawing, _tool, _conversion, _smaller_copies))
    return replace(make(rng, folder, shelf), largest_file=rng.choice(LIMITS))


def _training(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    more = [word for words in mutations.some(rng, ALSO_WRITTEN, 4) for word in words]
    is_run = "--debug_dataset" not in more and "--output_config" not in more
    suffix = ".ckpt" if "--save_model_as=ckpt" in more else ".safetensors"
    return training(folder, [*words_of_a_run(folder, shelf), *more], _is_there(folder / "out" / f"x{suffix}") if is_run else None)


def _drawing(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    words = [f"--ckpt={shelf.model}", "--outdir=out", "--W=64", "--H=64", "--steps=1", "--prompt=a cat", "--seed=1"]
    return Case(draw, words, folder, lambda printed: "" if list(folder.glob("out/*.png")) else "no image is there")


def _tool(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    suffix = rng.choice((".safetensors", ".ckpt"))
    lora, model, output = str(shelf.lora_file), str(shelf.model), f"out/x{suffix}"
    name, words = rng.choice((
        ("resize_lora", [f"--model={lora}", "--new_rank=1"]),
        ("merge_lora", ["--models", lora, lora, "--ratios", "0.5", "0.5"]),
        ("merge_lora", [f"--sd_model={model}", "--models", lora, "--ratios", "1"]),
        ("svd_merge_lora", ["--models", lora, lora, "--ratios", "0.5", "0.5"]),
        ("extract_lora_from_models", [f"--model_org={model}", f"--model_tuned={model}", "--dim=1"]),
        ("extract_lora_from_dylora", [f"--model={lora}", "--unit=1"]),
    ))  # fmt: skip
    main: Callable[[], None] = importlib.import_module(f"networks.{name}").main
    lost = None if name == "extract_lora_from_dylora" else _is_there(folder / output)  # that one writes a file a rank
    return Case(main, [*words, f"--save_to={output}"], folder, lost)


def _conversion(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    from tools.convert_diffusers20_original_sd import main

    output = rng.choice(("out/x.safetensors", "out/x.ckpt", "out/folder"))
    return Case(main, [str(shelf.model), output], folder, _is_there(folder / output))


def _smaller_copies(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    from tools.resize_images_to_resolution import main

    words_of_a_run(folder, shelf)  # makes the images
    words = ["data/1_x", "out", "--max_resolution=32x32", *rng.choice(([], ["--save_as_png"], ["--copy_associated_files"]))]
    return Case(main, words, folder, lambda printed: "" if list(folder.glob("out/good*")) else "no copy is there")


def _is_there(path: Path) -> Lost:
    return partial(_missing, path)


def _missing(path: Path, printed: str) -> str:
    return "" if path.exists() else f"it ends well, and {path.name} is not there"
