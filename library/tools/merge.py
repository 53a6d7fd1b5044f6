"""LoRAs merged into a model, tensor by tensor from file to file, and into one LoRA, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import UserError
from library.formats.lora_file import LoraFile, all_names
from library.formats.lora_targets import Target, is_v2, lora_targets
from library.formats.low_rank import LowRank, shuffle, stack
from library.formats.tensor_file import TensorFile
from library.formats.tensor_output import rows_in, write_weights
from library.tools.lora_metadata import base_model_of, merged_from, modelspec_of


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
