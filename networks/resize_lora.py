"""Make a LoRA file of a lower rank. `python networks/resize_lora.py --help` lists the options.

Every module becomes the best of its new rank, at the same strength. The rank is one number for all, or chosen module by module
from the singular values. LoHa, LoKr and others (see docs/networks.md) become the LoRA that is nearest to what they change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_tool
from library.errors import UserError, counted
from library.formats.precision import dtype_of
from library.tools import lora_options
from library.tools.command import Parser, path_text

if TYPE_CHECKING:
    from library.formats.lora_file import LoraFile

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=path_text, required=True, help="LoRA file to resize")
    parser.add_argument("--save_to", type=path_text, required=True, help="file to write: .safetensors, .ckpt, .pt or .pth")
    parser.add_argument("--new_rank", type=int, default=4, help="new rank; with --dynamic_method the largest one")
    parser.add_argument("--new_conv_rank", type=int, help="the same for 3x3 convolutions (default: --new_rank)")
    parser.add_argument("--dynamic_method", choices=METHODS, help="choose each module's rank by its singular values")
    target = "sv_ratio: keep those above the largest / this; sv_fro: keep this part of the norm; sv_cumulative: of their sum"
    parser.add_argument("--dynamic_param", type=float, help=target)
    lora_options.add_base_model(parser)
    lora_options.add_device(parser)
    lora_options.add_precision(parser, "--save_precision", "float")
    parser.add_argument("--verbose", action="store_true", help="print a line about every module")
    return parser


def _check(args: argparse.Namespace) -> None:
    lora_options.check_at_least_one("--new_rank", args.new_rank)
    lora_options.check_at_least_one("--new_conv_rank", args.new_conv_rank)
    if (args.dynamic_method is None) != (args.dynamic_param is None):
        missing = "--dynamic_param" if args.dynamic_param is None else "--dynamic_method"
        raise UserError(f"{missing} is missing; --dynamic_method and --dynamic_param go together")
    if args.dynamic_method == "sv_ratio" and not args.dynamic_param >= 1:
        raise UserError(f"--dynamic_param {args.dynamic_param:g}: must be at least 1 for sv_ratio")
    if args.dynamic_method in ("sv_fro", "sv_cumulative") and not 0 < args.dynamic_param <= 1:
        raise UserError(f"--dynamic_param {args.dynamic_param:g}: must be above 0 and at most 1 for {args.dynamic_method}")


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    _check(args)
    inputs = [Path(name) for name in (args.model, args.sd_model) if name]
    save_to = lora_options.output_path(args.save_to, inputs)
    from library.formats.lora_file import read_loras, write_lora
    from library.tools.changes import base_weights, matrices_alone
    from library.tools.kept import print_kept
    from library.tools.lora_metadata import changed_metadata
    from library.tools.resize import resize
    from library.tools.spooled import SpooledModules

    lora_options.check_device(args.device)
    (lora,) = matrices_alone(read_loras([args.model]))
    dtype = dtype_of(args.save_precision)
    with (
        base_weights(args.sd_model, [lora]) as (weight_of, (lora,)),
        SpooledModules(save_to.parent, dtype) as modules,
    ):
        _, kept = resize(
            lora,
            args.new_rank,
            args.new_conv_rank,
            method=args.dynamic_method,
            target=args.dynamic_param or 0.0,
            device=args.device,
            report=print if args.verbose else None,
            weight_of=weight_of,
            into=modules,
        )
        write_lora(save_to, modules, changed_metadata(lora, modules, _comment(args, lora), **_facts(args)), dtype)
        lower = sum(
            module.rank < (args.new_conv_rank or args.new_rank if module.is_3x3 else args.new_rank) for module in modules.values()
        )
    print_kept(kept)
    if lower and not args.dynamic_method:
        print(f"kept the rank of {counted(lower, 'module')} that had a lower one already")
    print(f"saved {save_to}")


def _facts(args: argparse.Namespace) -> dict[str, str]:
    return {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"} if args.dynamic_method else {}


def _comment(args: argparse.Namespace, lora: LoraFile) -> str:
    """How the file came about, as the common trainer's tool words it."""
    ranks = [module.rank for adapter in lora.modules.values() if (module := adapter.low_rank())]
    old = max(ranks) if ranks else next(iter(lora.modules.values())).title
    if args.dynamic_method:
        return f"Dynamic resize with {args.dynamic_method}: {args.dynamic_param:g} from {old}"
    conv = f" (conv: {args.new_conv_rank})" if args.new_conv_rank else ""
    return f"dimension is resized from {old} to {args.new_rank}{conv}"


if __name__ == "__main__":
    run_tool(main)
