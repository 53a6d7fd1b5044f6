"""Make a LoRA of the difference of two models. `python networks/extract_lora_from_models.py --help` lists the options.

Both files are read pairwise, layer by layer, and each difference becomes the best matrix of its rank, in seconds. How much of the
difference the LoRA explains is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_tool
from library.errors import UserError, counted
from library.formats.precision import dtype_of
from library.tools import lora_options
from library.tools.command import Parser, path_text

DIM = 4
NO_USE = ("--load_original_model_to", "--load_tuned_model_to")
REASON = "the models are read layer by layer; leave the option out, --device chooses where to calculate"
MOST = 128  # largest rank that --explained takes if --dim does not say otherwise


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--model_org", type=path_text, required=True, help="base model, .safetensors or .ckpt")
    parser.add_argument("--model_tuned", type=path_text, required=True, help="tuned model")
    parser.add_argument("--save_to", type=path_text, required=True, help="LoRA file to write: .safetensors, .ckpt or .pt")
    parser.add_argument("--dim", type=int, help=f"rank (default: {DIM}); with --explained the largest one (default: {MOST})")
    parser.add_argument(
        "--conv_dim", type=int, help="rank for 3x3 convolutions (default: residual blocks and samplers are left out)"
    )
    parser.add_argument(
        "--explained", type=float, help="choose each module's rank so that this part of its norm is kept, such as 0.9"
    )
    lora_options.add_family(parser)
    predicts_v = "metadata: the models predict v (default: as their files say)"
    parser.add_argument("--v_parameterization", action="store_true", help=predicts_v)
    lora_options.add_device(parser)
    lora_options.add_precision(parser, "--load_precision", text="cast both models to this first")
    lora_options.add_precision(parser, "--save_precision", "float")
    lora_options.add_clamp_quantile(parser)
    parser.add_argument(
        "--min_diff", type=float, default=1e-5, help="leave out modules whose norm changed by less than this part"
    )
    lora_options.add_no_metadata(parser)
    for option in NO_USE:
        parser.add_argument(option, help=f"not supported: {REASON}")
    return parser


def _check(args: argparse.Namespace) -> None:
    for option in NO_USE:
        if getattr(args, option[2:]) is not None:
            raise UserError(f"{option} is not supported: {REASON}")
    lora_options.check_at_least_one("--dim", args.dim)
    lora_options.check_at_least_one("--conv_dim", args.conv_dim)
    lora_options.check_quantile(args.clamp_quantile)
    if args.explained is not None and not 0 < args.explained <= 1:
        raise UserError(f"--explained {args.explained:g}: must be above 0 and at most 1")
    if not args.min_diff >= 0:
        raise UserError(f"--min_diff {args.min_diff:g}: must not be negative")


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    _check(args)
    paths = [Path(args.model_org), Path(args.model_tuned)]
    save_to = lora_options.output_path(args.save_to, paths)
    for option, path in zip(("--model_org", "--model_tuned"), paths, strict=True):
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; make one file of it with tools/convert_diffusers20_original_sd.py")

    from library.formats.lora_file import write_lora
    from library.formats.prediction import prediction_of_file
    from library.formats.tensor_file import open_tensors
    from library.tools.checkpoint import family_of_model
    from library.tools.extract import Extraction, extract, metadata_of
    from library.tools.kept import print_kept
    from library.tools.lora_metadata import Base, without_modelspec
    from library.tools.spooled import SpooledModules

    lora_options.check_device(args.device)
    dim = args.dim or (DIM if args.explained is None else MOST)
    load = dtype_of(args.load_precision) if args.load_precision else None
    how = Extraction(dim, args.conv_dim, args.explained, args.min_diff, args.clamp_quantile, load, args.device)
    dtype = dtype_of(args.save_precision)
    with (
        open_tensors(paths[0]) as original,
        open_tensors(paths[1]) as tuned,
        SpooledModules(save_to.parent, dtype) as modules,
    ):
        family, other = (family_of_model(file, args.v2, args.sdxl) for file in (original, tuned))
        if family is not other:
            raise UserError(f"{paths[0]} is {family.title}, {paths[1]} is {other.title}; give two models of one family")
        stated = prediction_of_file(tuned).prediction or prediction_of_file(original).prediction
        _, kept, unchanged = extract(original, tuned, how, modules)
        if not modules:
            raise UserError(f"{paths[0]} and {paths[1]} do not differ in the layers that a LoRA can change; nothing was written")
        base = Base(family, "v" if args.v_parameterization else stated or "epsilon")
        metadata = metadata_of(modules, save_to, paths[0], paths[1], base)
        write_lora(save_to, modules, without_modelspec(metadata) if args.no_metadata else metadata, dtype)
    print_kept(kept)
    if not any(name.startswith("lora_te") for name in kept):
        print("the text encoders are the same, so the LoRA is for the U-Net alone")
    elif unchanged:
        print(f"left out {counted(len(unchanged), 'module')} that did not change, such as {unchanged[0]}")
    print(f"saved {save_to}")


if __name__ == "__main__":
    run_tool(main)
