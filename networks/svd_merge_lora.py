"""Merge LoRA files into one of a chosen rank. `python networks/svd_merge_lora.py --help` lists the options.

The result is the best of that rank: no other is closer to the sum of ratio * alpha / rank * up @ down. It is found from the
factors alone, so it takes seconds. What could not be kept is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from library.errors import UserError
from library.formats.blocks import BASE, SD_BLOCKS, block_of
from library.formats.low_rank import Decomposition, LowRank, clamp, decompose, stack
from library.formats.tensor_file import PRECISIONS
from library.formats.tensor_output import output_path
from library.parallel import on_matrices
from networks.block_weights import read_block_weights
from networks.command_line import Parser, run
from networks.lora_file import LoraFile, all_names, check_ratios, read_loras, write_lora
from networks.lora_metadata import merged, without_modelspec

Kept = dict[str, tuple[float, float]]  # squared norm before and after, by module


def svd_merge(
    loras: Sequence[LoraFile],
    ratios: Sequence[float],
    new_rank: int,
    new_conv_rank: int | None = None,
    *,
    block_weights: Sequence[Mapping[str, float]] | None = None,
    device: str = "cpu",
    clamp_quantile: float | None = None,
) -> tuple[dict[str, LowRank], Kept]:
    """The sum of ratio * block weight * LoRA, each module cut to `new_rank`, or `new_conv_rank` if it is a 3x3 convolution.

    Where the ranks of the parts are fewer together, the sum is exact and has those.
    """
    weights = block_weights or [{}] * len(loras)

    def work(name: str) -> tuple[LowRank, tuple[float, float]]:
        block = block_of(name)
        parts = [
            (lora.modules[name], ratio * by_block.get(block, 1.0))
            for lora, ratio, by_block in zip(loras, ratios, weights, strict=True)
            if name in lora.modules
        ]
        total = stack(parts)
        limit = new_conv_rank or new_rank if total.is_3x3 else new_rank
        found = named(name, decompose, total, device, limit)
        module = found.low_rank(limit, total)
        kept = (found.total**2, (found.total * found.kept(limit)) ** 2)
        return (clamp(module, clamp_quantile) if clamp_quantile is not None else module), kept

    names = all_names(loras)
    results = tqdm(on_matrices(names, work, device), total=len(names), unit="module", desc="merging")
    return split_results(names, results)


def split_results(
    names: Sequence[str], results: Iterable[tuple[LowRank, tuple[float, float]]]
) -> tuple[dict[str, LowRank], Kept]:
    """Modules and norms by name, from pairs in the order of the names."""
    modules, kept = {}, {}
    for name, (module, norms) in zip(names, results, strict=True):
        modules[name], kept[name] = module, norms
    return modules, kept


def named(name: str, function, *values) -> Decomposition:
    """function(*values); an error of it says which module it was in."""
    try:
        return function(*values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def print_kept(kept: Kept) -> None:
    """A line for each block, and one for all: the part of the norm that was kept."""
    sums: dict[str, list[float]] = {}
    for name, (before, after) in kept.items():
        for block in (block_of(name), "all"):
            total = sums.setdefault(block, [0.0, 0.0])
            total[0] += before
            total[1] += after
    print("part of the norm that was kept:")
    for block in (BASE, *SD_BLOCKS.names, "all"):
        if block in sums:
            before, after = sums[block]
            print(f"  {'text encoder' if block == BASE else block:12} {(after / before) ** 0.5 if before else 1:7.2%}")


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    words = list(PRECISIONS)
    parser.add_argument("--save_to", required=True, help="file to write: .safetensors, .ckpt or .pt")
    parser.add_argument("--models", nargs="*", default=[], help="LoRA files; their ranks may differ")
    parser.add_argument(
        "--ratios", nargs="*", type=float, default=[], help="strength of each LoRA, in the same order; may be negative"
    )
    parser.add_argument("--new_rank", type=int, default=4, help="rank of the result")
    parser.add_argument("--new_conv_rank", type=int, help="rank for 3x3 convolutions (default: --new_rank)")
    lbw = "strength by block, one for each model: a preset such as MIDD, or 12, 16, 17, 20 or 26 numbers with commas"
    parser.add_argument("--lbw", "--lbws", nargs="*", dest="lbw", help=lbw)
    parser.add_argument("--device", default="cpu", help="where to calculate, such as cuda")
    parser.add_argument(
        "--clamp_quantile", type=float, help="cut numbers above this quantile of sizes, such as 0.99; costs accuracy"
    )
    parser.add_argument("--precision", choices=words, default="float", help="dtype in the file if --save_precision is not given")
    parser.add_argument("--save_precision", choices=words, help="dtype in the file")
    parser.add_argument(
        "--v_parameterization",
        action="store_true",
        default=None,
        help="metadata: for a model that predicts v (default: as the LoRAs say)",
    )
    parser.add_argument("--no_metadata", action="store_true", help="write only the metadata that loaders need")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    check_ratios(args.models, args.ratios)
    check_at_least_one("--new_rank", args.new_rank)
    check_at_least_one("--new_conv_rank", args.new_conv_rank)
    check_quantile(args.clamp_quantile)
    check_device(args.device)
    if args.lbw is not None and len(args.lbw) != len(args.models):
        raise UserError(f"--lbw: {len(args.lbw)} given for {len(args.models)} models; give one for each, in the same order")
    save_to = output_path(args.save_to, [Path(name) for name in args.models])
    block_weights = [read_block_weights(text) for text in args.lbw] if args.lbw is not None else None
    loras = read_loras(args.models)
    modules, kept = svd_merge(
        loras,
        args.ratios,
        args.new_rank,
        args.new_conv_rank,
        block_weights=block_weights,
        device=args.device,
        clamp_quantile=args.clamp_quantile,
    )
    metadata = merged(loras, args.ratios, modules, save_to, "merged by SVD", args.v_parameterization)
    if args.lbw is not None:
        metadata["ss_training_comment"] += f"; by block: {' | '.join(args.lbw)}"
    dtype = PRECISIONS[args.save_precision or args.precision]
    write_lora(save_to, modules, without_modelspec(metadata) if args.no_metadata else metadata, dtype)
    print_kept(kept)
    if args.clamp_quantile is not None:
        print("  (before --clamp_quantile, which costs more)")
    print(f"saved {save_to}")


def check_at_least_one(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{option} {value}: must be at least 1")


def check_quantile(value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise UserError(f"--clamp_quantile {value}: must be above 0 and at most 1")


def check_device(name: str) -> None:
    """UserError unless torch knows the device and has it."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}); use cpu") from error


if __name__ == "__main__":
    run(main)
