"""Merge LoRA files into a model, or into one LoRA: the program of networks/merge_lora.py and sdxl_merge_lora.py.

Into a model: W + sum of ratio * change, tensor by tensor from file to file, for LoRAs and other adapters (LoHa, LoKr, DoRA and
others, see docs/networks.md). Into one LoRA: exact, for LoRAs of any ranks and alphas, by putting the factors side by side; the
rank is the sum of the ranks (svd_merge_lora.py makes a smaller one, and takes other kinds).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from library.errors import UserError
from library.formats.precision import dtype_of
from library.tools import lora_options
from library.tools.command import Parser, path_text


def options() -> Parser:
    parser = Parser("Merge LoRA files into a model, or into one LoRA.")
    parser.add_argument(
        "--sd_model", type=path_text, help="checkpoint to merge into; without it the LoRAs are merged into one LoRA"
    )
    parser.add_argument("--save_to", type=path_text, required=True, help="file to write: .safetensors, .ckpt or .pt")
    lora_options.add_models(parser, "LoRA files")
    lora_options.add_family(parser)
    lora_options.add_block_weights(parser)
    parser.add_argument(
        "--v_parameterization",
        action="store_true",
        default=None,
        help="metadata: the model predicts v (default: as the LoRAs say)",
    )
    rounding = "dtype to round sums to before --save_precision; products are always float"
    lora_options.add_precision(parser, "--precision", "float", rounding)
    lora_options.add_precision(
        parser, "--save_precision", text="dtype in the file (default: a model's own; --precision for a LoRA)"
    )
    parser.add_argument("--concat", action="store_true", help="LoRA with LoRA: put the factors side by side; that is always done")
    parser.add_argument("--shuffle", action="store_true", help="LoRA with LoRA: ranks in a random order, the result is the same")
    lora_options.add_no_metadata(parser, "leave out modelspec keys; a LoRA keeps what loaders need")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = options().parse_args(arguments)
    lora_options.check_ratios(args.models, args.ratios)
    lora_options.check_count("--lbw", args.lbw, args.models)
    inputs = [Path(name) for name in (*args.models, *([args.sd_model] if args.sd_model else []))]
    save_to = lora_options.output_path(args.save_to, inputs)
    if args.sd_model:
        _into_model(args, save_to)
    else:
        _into_lora(args, save_to)


def _into_model(args: argparse.Namespace, save_to: Path) -> None:
    path = Path(args.sd_model)
    if path.is_dir():
        raise UserError(
            f"--sd_model {path} is a Diffusers folder; make one file of it with tools/convert_diffusers20_original_sd.py"
        )
    if args.shuffle or args.concat:
        raise UserError("--concat and --shuffle are for LoRAs merged into a LoRA; leave them out with --sd_model")

    from library.formats.lora_base import unlike_base
    from library.formats.lora_file import read_loras
    from library.formats.prediction import Prediction, prediction_of_file
    from library.formats.tensor_file import open_tensors
    from library.tools.block_weights import strengths
    from library.tools.checkpoint import family_of_model, loras_for
    from library.tools.lora_metadata import Base, base_of, merged_model_metadata
    from library.tools.merge import merge_into_model

    with open_tensors(path) as model:
        family = family_of_model(model, args.v2, args.sdxl)
        loras = loras_for(model, family, read_loras(args.models))
        stated: Prediction | None = "v" if args.v_parameterization else prediction_of_file(model).prediction
        for lora in loras:
            for reason in unlike_base(lora.metadata, family.records, stated or family.default_prediction):
                print(f"warning: {lora.path} {reason}", file=sys.stderr)
        parts = strengths(loras, args.ratios, args.lbw)
        base = Base(family, stated or base_of(loras).prediction)
        metadata = model.metadata if args.no_metadata else merged_model_metadata(model, base, loras, parts, save_to)
        save = dtype_of(args.save_precision) if args.save_precision else None
        unused = merge_into_model(model, loras, parts, save_to, metadata, compute=dtype_of(args.precision), save=save)
    if unused:
        print(f"warning: the model has no layer for {len(unused)} of the LoRA modules, such as {unused[0]}", file=sys.stderr)
    terms = [path.name, *(f"{ratio:g} x {Path(name).name}" for name, ratio in zip(args.models, args.ratios, strict=True))]
    print(f"saved {save_to}: {' + '.join(terms)}")


def _into_lora(args: argparse.Namespace, save_to: Path) -> None:
    from library.formats.lora_file import read_loras, write_lora
    from library.tools.block_weights import strengths
    from library.tools.changes import matrices_alone
    from library.tools.checkpoint import check_family, warn_of_open_blocks
    from library.tools.lora_metadata import merged_metadata, without_modelspec
    from library.tools.merge import merge_loras
    from library.tools.spooled import SpooledModules

    loras = matrices_alone(read_loras(args.models))
    check_family(loras, args.v2, args.sdxl)
    warn_of_open_blocks(loras, "for KOALA use svd_merge_lora.py with --sd_model")
    parts = strengths(loras, args.ratios, args.lbw)
    dtype = dtype_of(args.save_precision or args.precision)
    with SpooledModules(save_to.parent, dtype) as modules:
        merge_loras(loras, parts, args.shuffle, modules)
        metadata = merged_metadata(loras, parts, modules, save_to, "merged", args.v_parameterization, args.lbw)
        write_lora(save_to, modules, without_modelspec(metadata) if args.no_metadata else metadata, dtype)
        ranks = sorted({module.rank for module in modules.values()})
    text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"saved {save_to}: the exact sum, {text}; for a smaller file of nearly the same effect use svd_merge_lora.py")
