"""Merge LoRA files into a model, or into one LoRA. `python networks/merge_lora.py --help` lists the options.

Into a model: W + sum of ratio * alpha / rank * up @ down, tensor by tensor from file to file. Into one LoRA: exact, for any
ranks and alphas, by putting the factors side by side; the rank is the sum of the ranks (svd_merge_lora.py makes a smaller one).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import UserError
from library.formats.lora_file import LoraFile, all_names, read_loras, write_lora
from library.formats.lora_targets import Target, is_v2, lora_targets
from library.formats.low_rank import LowRank, shuffle, stack
from library.formats.tensor_file import PRECISIONS, TensorFile, open_tensors
from library.formats.tensor_output import rows_in, write_weights
from library.tools import lora_options
from library.tools.checkpoint import check_model
from library.tools.command import Parser, run
from library.tools.lora_metadata import base_model_of, merged, merged_from, modelspec_of, without_modelspec


def merge_into_model(
    model: TensorFile,
    loras: Sequence[LoraFile],
    ratios: Sequence[float],
    save_to: Path,
    *,
    compute: torch.dtype = torch.float32,
    save: torch.dtype | None = None,
    v_parameterization: bool | None = None,
    with_modelspec: bool = True,
) -> list[str]:
    """Write the model with the LoRAs merged in; returns the LoRA modules that the model has no layer for.

    save None: every tensor keeps its dtype. Tensors that are no part of the network (the noise schedule's) keep it always.
    """
    targets = lora_targets(model.shapes)
    if not targets:
        raise UserError(f"{model.path} is no Stable Diffusion 1.x or 2.x checkpoint: its layers have other names")
    changes: dict[str, list[tuple[Target, LowRank, float]]] = {}
    for lora, ratio in zip(loras, ratios, strict=True):
        for name, module in lora.modules.items():
            if name in targets:
                _check_size(model, lora, name, targets[name])
                changes.setdefault(targets[name].key, []).append((targets[name], module, ratio))
    unused = [name for name in all_names(loras) if name not in targets]
    if not changes:
        raise UserError(
            f"{model.path} has no layer for any module of the LoRAs, such as {unused[0]}; they are for another kind of model"
        )
    plan = {name: (shape, _saved_dtype(name, model.dtypes[name], save)) for name, shape in model.shapes.items()}
    sums = lru_cache(4)(lambda name: _summed(changes[name]))
    progress = tqdm(total=sum(map(math.prod, model.shapes.values())), unit="number", unit_scale=True, desc="merging")

    def rows_of(name: str, rows: slice) -> Tensor:
        value = rows_in(model.view(name), rows)
        if name in changes:
            value = _merged(value.to(torch.float32, copy=True), rows, len(model.view(name)), sums(name)).to(compute)
        progress.update(value.numel())
        return value.to(plan[name][1])

    metadata = dict(model.metadata)
    if with_modelspec:
        v2 = is_v2(model.shapes)
        facts = base_model_of(loras, v_parameterization) | ({"ss_v2": str(v2)} if v2 is not None else {})
        titles = [metadata.get("modelspec.title") or model.path.stem, *(lora.title for lora in loras)]
        spec = modelspec_of(save_to, facts, titles, metadata.get("modelspec.resolution"), lora=False)
        metadata |= spec | {"ss_merged_from": merged_from(loras, ratios)}
    with progress:
        write_weights(save_to, plan, rows_of, metadata, model.numbers)
    return unused


def _check_size(model: TensorFile, lora: LoraFile, name: str, target: Target) -> None:
    out_size, *inside = model.shapes[target.key]
    rows = target.rows(out_size)
    size = (rows.stop - rows.start, torch.Size(inside).numel())
    if lora.modules[name].matrix_shape != size:
        found = lora.modules[name].matrix_shape
        raise UserError(
            f"{lora.path} does not fit {model.path}: {name} changes a layer of {found[1]} in, {found[0]} out, "
            f"here it has {size[1]} in, {size[0]} out; is it for another Stable Diffusion version?"
        )


def _saved_dtype(name: str, dtype: torch.dtype, save: torch.dtype | None) -> torch.dtype:
    # The noise schedule (betas, ...) has names without a dot and stays float32 in half-precision files too.
    return save if save and dtype.is_floating_point and "." in name else dtype


def _summed(changes: Sequence[tuple[Target, LowRank, float]]) -> dict[Target, tuple[Tensor, Tensor]]:
    """The factors of the sum of ratio * scale * up @ down for each layer in a tensor: side by side, so it is one product."""
    result = {}
    for target in {target for target, _, _ in changes}:
        parts = [(module.scale * ratio, *module.matrices()) for where, module, ratio in changes if where == target]
        result[target] = torch.cat([strength * up for strength, up, _ in parts], 1), torch.cat([down for _, _, down in parts])
    return result


def _merged(weight: Tensor, rows: slice, count: int, changes: Mapping[Target, tuple[Tensor, Tensor]]) -> Tensor:
    """These float32 rows, of `count` in all, with the products of the factors added in place."""
    for target, (up, down) in changes.items():
        own = target.rows(count)
        first, last = max(rows.start, own.start), min(rows.stop, own.stop)
        if first < last:
            part = weight[first - rows.start : last - rows.start]
            part.view(last - first, -1).addmm_(up[first - own.start : last - own.start], down)
    return weight


def merge_loras(loras: Sequence[LoraFile], ratios: Sequence[float], shuffled: bool = False) -> dict[str, LowRank]:
    """The exact sum of ratio * LoRA, by module. A module that only some of the files have is the sum over those."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for name in tqdm(all_names(loras), unit="module", desc="merging"):
        parts = [(lora.modules[name], ratio) for lora, ratio in zip(loras, ratios, strict=True) if name in lora.modules]
        result[name] = shuffle(stack(parts), generator) if shuffled else stack(parts)
    return result


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--sd_model", help="checkpoint to merge into; without it the LoRAs are merged into one LoRA")
    parser.add_argument("--save_to", required=True, help="file to write: .safetensors, .ckpt or .pt")
    lora_options.add_models(parser, "LoRA files")
    parser.add_argument("--v2", action="store_true", help="the model is Stable Diffusion 2.x")
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


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    lora_options.check_ratios(args.models, args.ratios)
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
    with open_tensors(path) as model:
        loras = read_loras(args.models)
        check_model(model, args.v2, loras)
        unused = merge_into_model(
            model,
            loras,
            args.ratios,
            save_to,
            compute=PRECISIONS[args.precision],
            save=lora_options.dtype_of(args.save_precision),
            v_parameterization=args.v_parameterization,
            with_modelspec=not args.no_metadata,
        )
    if unused:
        print(f"warning: the model has no layer for {len(unused)} of the LoRA modules, such as {unused[0]}", file=sys.stderr)
    parts = [path.name, *(f"{ratio:g} x {Path(name).name}" for name, ratio in zip(args.models, args.ratios, strict=True))]
    print(f"saved {save_to}: {' + '.join(parts)}")


def _into_lora(args: argparse.Namespace, save_to: Path) -> None:
    if args.v2:
        raise UserError("--v2 is for merging into a model with --sd_model; leave it out")
    loras = read_loras(args.models)
    modules = merge_loras(loras, args.ratios, args.shuffle)
    metadata = merged(loras, args.ratios, modules, save_to, "merged", args.v_parameterization)
    dtype = PRECISIONS[args.save_precision or args.precision]
    write_lora(save_to, modules, without_modelspec(metadata) if args.no_metadata else metadata, dtype)
    ranks = sorted({module.rank for module in modules.values()})
    text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"saved {save_to}: the exact sum, {text}; for a smaller file of nearly the same effect use svd_merge_lora.py")


if __name__ == "__main__":
    run(main)
