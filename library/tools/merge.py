"""Merging LoRAs: into a model, tensor by tensor from file to file; or exactly into one LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import UserError
from library.formats.adapters.registry import Adapter
from library.formats.lora_file import LoraFile, all_names
from library.formats.lora_targets import Target, bias_targets, weight_targets
from library.formats.low_rank import LowRank, shuffle, stack
from library.formats.tensor_file import TensorFile
from library.formats.tensor_output import rows_in, write_weights
from library.tools.block_weights import Strength
from library.tools.kept import Modules


def merge_into_model(
    model: TensorFile,
    loras: Sequence[LoraFile],
    strengths: Sequence[Strength],
    save_to: Path,
    metadata: Mapping[str, str],
    *,
    compute: torch.dtype = torch.float32,
    save: torch.dtype | None = None,
) -> list[str]:
    """Write the model with the LoRAs merged in; returns the LoRA modules for which the model has no layer.

    save None: every tensor keeps its dtype, but those of 8 bits become float16. Tensors of the noise schedule always keep theirs.
    """
    changes, unused = _changes(model, loras, strengths)
    if not changes:
        raise UserError(
            f"{model.path} has no layer for any module of the LoRAs, such as {unused[0]}; they are for another kind of model"
        )
    plan = {name: (shape, _saved_dtype(name, model.dtypes[name], save)) for name, shape in model.shapes.items()}
    sums = lru_cache(4)(lambda name: _summed(model.view(name), changes[name]))
    progress = tqdm(total=sum(map(math.prod, model.shapes.values())), unit="number", unit_scale=True, desc="merging")

    def rows_of(name: str, rows: slice) -> Tensor:
        value = rows_in(model.view(name), rows)
        if name in changes:
            value = _merged(value.to(torch.float32, copy=True), rows, len(model.view(name)), sums(name)).to(compute)
        progress.update(value.numel())
        return value.to(plan[name][1])

    with progress:
        write_weights(save_to, plan, rows_of, metadata, model.counters)
    return unused


@dataclass(frozen=True)
class Change:
    """The change that one file makes to one target: a tensor of the model, or some rows of it."""

    target: Target
    lora: LoraFile
    adapter: Adapter
    ratio: float
    of_bias: bool

    def dense(self, weight: Tensor) -> Tensor:
        """ratio * change, in float32 and as a matrix; weight: that of the target, in float32."""
        try:
            change = self.adapter.bias_change(weight) if self.of_bias else self.adapter.weight_change(weight)
        except UserError as error:
            raise UserError(f"{self.lora.path}: {error}") from error
        return torch.zeros_like(weight).flatten(1) if change is None else (change * self.ratio).reshape(len(weight), -1)


def _changes(
    model: TensorFile, loras: Sequence[LoraFile], strengths: Sequence[Strength]
) -> tuple[dict[str, list[Change]], list[str]]:
    """The changes by name of the tensor in the model, and the modules for which the model has no layer."""
    weights, biases = weight_targets(model.shapes), bias_targets(model.shapes)
    changes: dict[str, list[Change]] = {}
    unused = []
    for lora, strength in zip(loras, strengths, strict=True):
        for name, adapter in lora.modules.items():
            targets = [(weights.get(name), False)] if adapter.changes_weight else []
            targets += [(biases.get(name), True)] if adapter.changes_bias else []
            for target, of_bias in targets:
                if target is None:
                    unused.append(f"{name} (its bias)" if of_bias and name in weights else name)
                    continue
                if not of_bias:
                    _check_size(model, lora, name, target)
                changes.setdefault(target.key, []).append(Change(target, lora, adapter, strength.of(name), of_bias))
    return changes, list(dict.fromkeys(unused))


def _check_size(model: TensorFile, lora: LoraFile, name: str, target: Target) -> None:
    out_size, *inside = target.weight(torch.empty(model.shapes[target.key], device="meta")).shape
    size = (out_size, torch.Size(inside).numel())
    found = lora.modules[name].matrix_shape
    if found not in (None, size):
        raise UserError(
            f"{lora.path} does not fit {model.path}: {name} changes a layer of {found[1]} in, {found[0]} out, "
            f"here it has {size[1]} in, {size[0]} out; is it for another Stable Diffusion version?"
        )


def _saved_dtype(name: str, dtype: torch.dtype, save: torch.dtype | None) -> torch.dtype:
    # The noise schedule (betas, ...) has names without a dot and stays float32 in half-precision files too.
    if not dtype.is_floating_point or "." not in name:
        return dtype
    return save or (torch.float16 if dtype.itemsize == 1 else dtype)  # the rounding of 8 bits is coarser than most LoRAs


@dataclass(frozen=True)
class Sum:
    """The sum of all changes of a target: up @ down + dense. The factors of all LoRAs are concatenated to one product.

    It has the rows and columns of the tensor in the file.
    """

    up: Tensor
    down: Tensor
    dense: Tensor | None

    def transposed(self) -> Sum:
        return Sum(self.down.T, self.up.T, None if self.dense is None else self.dense.T)


def _summed(tensor: Tensor, changes: Sequence[Change]) -> dict[Target, Sum]:
    """The changes of one tensor, summed for each target in it. A change that depends on the weight gets the model's weight."""
    result = {}
    for target in dict.fromkeys(change.target for change in changes):
        own = [change for change in changes if change.target == target]
        factors = [(module, change.ratio) for change in own if not change.of_bias and (module := change.adapter.low_rank())]
        ups = [module.matrices()[0] * (module.scale * ratio) for module, ratio in factors]
        downs = [module.matrices()[1] for module, _ in factors]
        weight = target.weight(tensor)
        up = torch.cat(ups, 1) if ups else torch.zeros(len(weight), 0)
        down = torch.cat(downs) if downs else torch.zeros(0, weight[0].numel())
        others = [change for change in own if change.of_bias or not change.adapter.is_lora]
        weight = weight.float() if others else weight
        dense = sum((change.dense(weight) for change in others[1:]), others[0].dense(weight)) if others else None
        result[target] = Sum(up, down, dense).transposed() if target.is_transposed else Sum(up, down, dense)
    for change in changes:
        change.lora.windows.forget(change.adapter.nbytes)
    return result


def _merged(weight: Tensor, rows: slice, count: int, changes: Mapping[Target, Sum]) -> Tensor:
    """Add the changes in place to some rows (float32) of a tensor of `count` rows; returns the rows."""
    for target, change in changes.items():
        own = target.rows(count)
        first, last = max(rows.start, own.start), min(rows.stop, own.stop)
        if first < last:
            part = weight[first - rows.start : last - rows.start].view(last - first, -1)
            part.addmm_(change.up[first - own.start : last - own.start], change.down)
            if change.dense is not None:
                part += change.dense[first - own.start : last - own.start]
    return weight


def merge_loras(
    loras: Sequence[LoraFile], strengths: Sequence[Strength], shuffled: bool = False, into: Modules | None = None
) -> Modules:
    """The exact sum of strength * LoRA, by module. A module that only some files have is the sum over those.

    into: where the modules are kept.
    """
    generator = torch.Generator().manual_seed(0)
    result: Modules = {} if into is None else into
    for name in tqdm(all_names(loras), unit="module", desc="merging"):
        pairs = zip(loras, strengths, strict=True)
        parts = [(_low_rank(lora, name), strength.of(name)) for lora, strength in pairs if name in lora.modules]
        result[name] = shuffle(stack(parts), generator) if shuffled else stack(parts)
        for lora in loras:
            lora.windows.forget(lora.modules[name].nbytes if name in lora.modules else 0)
    return result


def _low_rank(lora: LoraFile, name: str) -> LowRank:
    module = lora.modules[name].low_rank()
    if module is None:
        raise UserError(
            f"{lora.path}: {name} is of the kind {lora.modules[name].title}, whose sum with others is no LoRA; "
            "use svd_merge_lora.py, or merge into a model with --sd_model"
        )
    return module
