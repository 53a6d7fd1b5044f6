"""Convert models of Stable Diffusion 1.x, 2.x and SDXL between one file (.safetensors, .ckpt) and a Diffusers folder, both ways.

`python tools/convert_diffusers20_original_sd.py model.safetensors model_folder`

A target with a suffix becomes a file in CompVis layout, one without a Diffusers folder. Every tensor keeps its dtype
unless one is given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_entry
from library.errors import UserError
from library.tools.command import Parser, path_text

if TYPE_CHECKING:
    import torch

    from library.models.family import Model

FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt")
WORDS = ("fp16", "bf16", "float")
REASONS = {
    "variant": "a folder's full weights are used if they are there, its fp16 ones else; leave the option out",
    "reference_model": "scheduler and tokenizer come with this suite; leave the option out",
}


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("model_to_load", type=path_text, help="file, Diffusers folder or hub id")
    parser.add_argument(
        "model_to_save", type=path_text, help="with a suffix (.safetensors, .ckpt): a file; without: a Diffusers folder"
    )
    version = parser.add_mutually_exclusive_group()
    for name, is_v2 in (("1", False), ("2", True)):
        text = f"the model is {name}.x (default: read from the model)"
        version.add_argument(f"--v{name}", dest="v2", action="store_const", const=is_v2, help=text)
    parser.add_argument("--v_parameterization", action="store_true", help="the model predicts v (default: what the model says)")
    dtype = parser.add_mutually_exclusive_group()
    for name in WORDS:
        dtype.add_argument(f"--{name}", action="store_true", help=f"save as {name}")
    dtype.add_argument("--save_precision_as", choices=WORDS, help="the same as a word (default: as it was)")
    parser.add_argument("--vae", type=path_text, help="take the VAE from this file, folder or hub id")
    parser.add_argument("--epoch", type=int, help="epoch to write into a .ckpt")
    parser.add_argument("--global_step", type=int, help="step to write into a .ckpt")
    parser.add_argument("--metadata", help='metadata for a .safetensors file, as JSON: {"modelspec.title": "mine"}')
    parser.add_argument("--use_safetensors", action="store_true", help="Diffusers folders are always written as safetensors")
    linear = "2.x folders always have linear projections, as their files do"
    parser.add_argument("--unet_use_linear_projection", action="store_true", help=linear)
    for name, reason in REASONS.items():
        parser.add_argument(f"--{name}", help=f"not supported: {reason}")
    return parser


def read_metadata(text: str | None) -> dict[str, str] | None:
    """A JSON object of texts; nothing in it is run."""
    if text is None:
        return None
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise UserError(f'--metadata is no JSON ({error}); write it as in \'{{"modelspec.title": "mine"}}\'') from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError("--metadata must be a JSON object whose values are texts in double quotes")
    return metadata


def check(args: argparse.Namespace) -> Path:
    """The path to save to; UserError if the options do not go together."""
    for name, reason in REASONS.items():
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is not supported: {reason}")
    source, target = Path(args.model_to_load), Path(args.model_to_save)
    suffix = target.suffix.lower()
    # A dot may be part of a folder's name, as in `model-1.5`; a suffix of letters is meant as one.
    if suffix[1:].isalpha() and suffix not in FILE_SUFFIXES:
        raise UserError(
            f"{target}: the suffix decides the format; use {', '.join(FILE_SUFFIXES)}, or none for a Diffusers folder"
        )
    if source.exists() and os.path.realpath(source) == os.path.realpath(target):  # `resolve` raises for a link to itself
        raise UserError(f"{target} would overwrite the model that is read; give another name")
    if (args.epoch, args.global_step) != (None, None) and suffix not in (".ckpt", ".pt"):
        raise UserError("--epoch and --global_step have a place in a .ckpt only; leave them out")
    if args.metadata is not None and suffix != ".safetensors":
        raise UserError("--metadata has a place in a .safetensors file only; leave it out")
    return target


def convert(args: argparse.Namespace, target: Path) -> None:
    from library.formats.precision import dtype_of
    from library.models.loading import load_stable_diffusion
    from library.models.saving import save_stable_diffusion

    metadata = read_metadata(args.metadata)
    chosen = args.save_precision_as or next((name for name in WORDS if getattr(args, name)), None)
    dtype = dtype_of(chosen) if chosen else None
    prediction = "v" if args.v_parameterization else None
    model = load_stable_diffusion(args.model_to_load, v2=args.v2, prediction=prediction, dtype=dtype, vae=args.vae)
    if args.unet_use_linear_projection and not model.denoiser.config.use_linear_projection:
        raise UserError(f"--unet_use_linear_projection: {model.family.title} has no linear projections; leave it out")
    given = (args.epoch, args.global_step) != (None, None)
    counters = {"epoch": args.epoch or 0, "global_step": args.global_step or 0} if given else None
    save_stable_diffusion(model, target, dtype, metadata, counters)
    print(f"saved {target}: {model.family.title}, {dtypes_of(model)}")


def dtypes_of(model: Model) -> str:
    """The dtype of most weights of each part: `float16`, or `float16, vae float32`."""
    by_part = {
        name: Counter(weight.dtype for weight in part.parameters()).most_common(1)[0][0] for name, part in model.parts.items()
    }
    main = by_part["unet"]
    others = [f"{name} {_plain(dtype)}" for name, dtype in by_part.items() if dtype != main]
    return ", ".join([_plain(main), *others])


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    convert(args, check(args))


if __name__ == "__main__":
    run_entry(main)
