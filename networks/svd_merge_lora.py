"""Merge LoRA files into one of a chosen rank. `python networks/svd_merge_lora.py --help` lists the options.

The result is the best of that rank: no other is closer to the sum of ratio * change. For LoRAs it is found from the factors
alone, so it takes seconds; LoHa, LoKr and others (see docs/networks.md) can be among them. What could not be kept is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_tool
from library.formats.precision import dtype_of
from library.tools import lora_options
from library.tools.command import Parser, path_text


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--save_to", type=path_text, required=True, help="file to write: .safetensors, .ckpt or .pt")
    lora_options.add_models(parser, "LoRA files; their ranks may differ")
    parser.add_argument("--new_rank", type=int, default=4, help="rank of the result")
    parser.add_argument("--new_conv_rank", type=int, help="rank for 3x3 convolutions (default: --new_rank)")
    lora_options.add_family(parser)
    lora_options.add_block_weights(parser)
    lora_options.add_base_model(parser)
    lora_options.add_device(parser)
    lora_options.add_clamp_quantile(parser)
    lora_options.add_precision(parser, "--precision", "float", "dtype in the file if --save_precision is not given")
    lora_options.add_precision(parser, "--save_precision")
    parser.add_argument(
        "--v_parameterization",
        action="store_true",
        default=None,
        help="metadata: for a model that predicts v (default: as the LoRAs say)",
    )
    lora_options.add_no_metadata(parser)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    lora_options.check_ratios(args.models, args.ratios)
    lora_options.check_at_least_one("--new_rank", args.new_rank)
    lora_options.check_at_least_one("--new_conv_rank", args.new_conv_rank)
    lora_options.check_quantile(args.clamp_quantile)
    lora_options.check_count("--lbw", args.lbw, args.models)
    inputs = [Path(name) for name in (*args.models, args.sd_model) if name]
    save_to = lora_options.output_path(args.save_to, inputs)
    from library.formats.lora_file import read_loras, write_lora
    from library.tools.block_weights import strengths
    from library.tools.changes import base_weights, matrices_alone
    from library.tools.checkpoint import check_family
    from library.tools.kept import print_kept
    from library.tools.lora_metadata import merged_metadata, without_modelspec
    from library.tools.spooled import SpooledModules
    from library.tools.svd_merge import svd_merge

    lora_options.check_device(args.device)
    loras = matrices_alone(read_loras(args.models))
    check_family(loras, args.v2, args.sdxl)
    dtype = dtype_of(args.save_precision or args.precision)
    with (
        base_weights(args.sd_model, loras) as (weight_of, loras),
        SpooledModules(save_to.parent, dtype) as modules,
    ):
        parts = strengths(loras, args.ratios, args.lbw)
        _, kept = svd_merge(
            loras,
            parts,
            args.new_rank,
            args.new_conv_rank,
            device=args.device,
            clamp_quantile=args.clamp_quantile,
            weight_of=weight_of,
            into=modules,
        )
        metadata = merged_metadata(loras, parts, modules, save_to, "merged by SVD", args.v_parameterization, args.lbw)
        write_lora(save_to, modules, without_modelspec(metadata) if args.no_metadata else metadata, dtype)
    print_kept(kept)
    if args.clamp_quantile is not None:
        print("  (before --clamp_quantile, which costs more)")
    print(f"saved {save_to}")


if __name__ == "__main__":
    run_tool(main)
