"""Options of several LoRA tools, each declared once with its check."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from library.errors import UserError
from library.formats.precision import PRECISIONS
from library.tools.command import Parser, path_text


def add_models(parser: Parser, text: str) -> None:
    """--models and --ratios."""
    parser.add_argument("--models", nargs="*", type=path_text, default=[], help=text)
    ratios = "strength of each LoRA, in the same order; may be negative"
    parser.add_argument("--ratios", nargs="*", type=float, default=[], help=ratios)


def add_family(parser: Parser) -> None:
    """--v2 and --sdxl, which only check the files."""
    family = parser.add_mutually_exclusive_group()
    family.add_argument("--v2", action="store_true", help="the files are of Stable Diffusion 2.x (default: read from them)")
    family.add_argument("--sdxl", action="store_true", help="the files are of SDXL (default: read from them)")


def add_block_weights(parser: Parser) -> None:
    """--lbw"""
    lists = "12 or 20 numbers with commas for SDXL, 16, 17 or 26 for SD 1.x and 2.x"
    text = f"strength by block, one for each model: a preset such as MIDD, or {lists}"
    parser.add_argument("--lbw", "--lbws", nargs="*", dest="lbw", help=text)


def add_precision(parser: Parser, option: str, default: str | None = None, text: str = "dtype in the file") -> None:
    """An option such as --save_precision."""
    parser.add_argument(option, choices=list(PRECISIONS), default=default, help=text)


def add_device(parser: Parser) -> None:
    """--device"""
    parser.add_argument("--device", default="cpu", help="where to calculate, such as cuda")


def add_base_model(parser: Parser) -> None:
    """--sd_model for tools that make a LoRA."""
    text = "the model that the file is for, .safetensors or .ckpt; needed for DoRA, GLoRA, IA3, OFT and BOFT alone"
    parser.add_argument("--sd_model", type=path_text, help=text)


def add_clamp_quantile(parser: Parser) -> None:
    """--clamp_quantile"""
    text = "cut numbers above this quantile of sizes, such as 0.99; costs accuracy"
    parser.add_argument("--clamp_quantile", type=float, help=text)


def add_no_metadata(parser: Parser, text: str = "write only the metadata that loaders need") -> None:
    """--no_metadata"""
    parser.add_argument("--no_metadata", action="store_true", help=text)


def output_path(
    name: str | os.PathLike, inputs: Sequence[Path], suffixes: Sequence[str] = (".safetensors", ".ckpt", ".pt", ".pth")
) -> Path:
    """The path of --save_to. Raises UserError for an unknown suffix, a folder, or an input file."""
    path = Path(name)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--save_to {name}: the suffix decides the format; use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"--save_to {name} is a folder; give a file name")
    found = path if path.exists() else Path(os.path.abspath(path))  # `new/../a` before `new` exists
    for other in inputs:
        if found.exists() and other.exists() and os.path.samefile(found, other):
            raise UserError(f"--save_to {name} would overwrite an input; give another name")
    return path


def check_ratios(models: Sequence[str], ratios: Sequence[float]) -> None:
    """Raises UserError unless there is one finite ratio for each model."""
    if not models:
        raise UserError("--models: give at least one LoRA file")
    if len(models) != len(ratios):
        raise UserError(f"--ratios: {len(ratios)} given for {len(models)} models; give one for each, in the same order")
    if wrong := [ratio for ratio in ratios if not math.isfinite(ratio)]:
        raise UserError(f"--ratios: {wrong[0]} is no strength; give numbers such as 0.8")


def check_count(option: str, values: Sequence[str] | None, models: Sequence[str]) -> None:
    """Raises UserError if values are given, but not one for each model."""
    if values is not None and len(values) != len(models):
        raise UserError(f"{option}: {len(values)} given for {len(models)} models; give one for each, in the same order")


def check_at_least_one(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{option} {value}: must be at least 1")


def check_quantile(value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise UserError(f"--clamp_quantile {value}: must be above 0 and at most 1")


def check_device(name: str) -> None:
    """Raises UserError unless torch can use the device. Imports torch: call it after all other checks."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]}); use cpu") from error
