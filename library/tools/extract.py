"""A LoRA of the difference of two models, which are read pairwise, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import UserError
from library.formats.lora_targets import Target, lora_targets
from library.formats.low_rank import LowRank, best_low_rank, clamp, is_3x3, rank_for, rank_for_share
from library.formats.tensor_file import TensorFile
from library.parallel import on_matrices
from library.tools.kept import Kept, Modules, for_module
from library.tools.lora_metadata import Base, modelspec_of, network_metadata


@dataclass(frozen=True)
class Extraction:
    """How to make the LoRA. dim, conv_dim: ranks (conv_dim None: attention layers only); explained: the part of each module's
    norm to reach with the smallest rank up to those; min_diff: modules that changed less than this, relative to their norm, are
    left out; clamp_quantile: see `clamp`; load: dtype to cast both models to first."""

    dim: int
    conv_dim: int | None = None
    explained: float | None = None
    min_diff: float = 1e-5
    clamp_quantile: float | None = None
    load: torch.dtype | None = None
    device: str = "cpu"

    def rank_limit(self, shape: Sequence[int]) -> int:
        return min(rank_for(is_3x3(shape), self.dim, self.conv_dim), shape[0], torch.Size(shape[1:]).numel())


def extract(
    original: TensorFile, tuned: TensorFile, how: Extraction, into: Modules | None = None
) -> tuple[Modules, Kept, list[str]]:
    """The modules, the squared norms of difference and LoRA, and the names of the modules left out as not changed.

    into: where the modules are kept.
    """
    modules: Modules = {} if into is None else into
    kept: Kept = {}
    unchanged = []
    pairs = _pairs(original, tuned, how)
    layers = (layer for key, targets in pairs.items() for layer in _layers(original, tuned, key, targets, how))

    def work(layer: tuple[str, Tensor, Tensor]) -> tuple[str, tuple[LowRank, tuple[float, float]] | None]:
        name, before, after = layer
        difference = _difference(before, after, how.min_diff)
        used = before.nbytes
        del layer, before, after
        for file in (original, tuned):
            file.windows.forget(used)
        return name, None if difference is None else for_module(name, _module, difference, how)

    count = sum(len(targets) for targets in pairs.values())
    for name, result in tqdm(on_matrices(layers, work, how.device), total=count, unit="module", desc="extracting"):
        if result is None:
            unchanged.append(name)
        else:
            modules[name], kept[name] = result
    return modules, kept, unchanged


def _pairs(original: TensorFile, tuned: TensorFile, how: Extraction) -> dict[str, list[tuple[str, Target, Target]]]:
    """The modules to extract with their targets in both files, by the key of the tensor in the first. Sizes are checked."""
    first, second = (lora_targets(file.shapes, how.conv_dim is not None) for file in (original, tuned))
    if odd := next(iter(first.keys() ^ second.keys()), None):
        lacks = tuned if odd in first else original
        raise UserError(f"{lacks.path} has no layer {odd}, the other model has; they are not of one kind")
    pairs: dict[str, list[tuple[str, Target, Target]]] = {}
    for name, target in first.items():
        shapes = original.shapes[target.key], tuned.shapes[second[name].key]
        if torch.Size(shapes[0]).numel() != torch.Size(shapes[1]).numel():
            raise UserError(f"{name} is {shapes[0]} in {original.path} and {shapes[1]} in {tuned.path}; they are not of one kind")
        pairs.setdefault(target.key, []).append((name, target, second[name]))
    return pairs


def _layers(
    original: TensorFile, tuned: TensorFile, key: str, targets: Sequence[tuple[str, Target, Target]], how: Extraction
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight before, weight after) of the layers in one tensor."""
    before, after = original.view(key), tuned.view(targets[0][2].key)
    if how.load is not None:
        before, after = before.to(how.load), after.to(how.load)
    after = after.view(before.shape)  # SD 2 has projections as Linear or as 1x1 convolution
    for name, target, _ in targets:
        rows = target.rows(len(before))
        yield name, before[rows], after[rows]


def _difference(before: Tensor, after: Tensor, min_diff: float) -> Tensor | None:
    """after - before in float32; None if it is relatively too small, or only rounding to another dtype."""
    if before.dtype != after.dtype:
        coarse = min((before.dtype, after.dtype), key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
        if torch.equal(before.to(coarse), after.to(coarse)):
            return None
    difference = after.to(torch.float32, copy=True)
    difference -= before.float()  # in place: of SDXL's largest layers each float32 copy has 52 MB
    return None if difference.norm() <= min_diff * before.float().norm() else difference


def _module(difference: Tensor, how: Extraction) -> tuple[LowRank, tuple[float, float]]:
    limit = how.rank_limit(difference.shape)
    found = best_low_rank(difference.flatten(1).to(how.device), limit, share=how.explained)
    rank = limit if how.explained is None else min(limit, rank_for_share(found, how.explained))
    module = found.low_rank(rank, difference.shape)
    if how.clamp_quantile is not None:
        module = clamp(module, how.clamp_quantile)
    return module, (found.total**2, (found.total * found.kept(rank)) ** 2)


def metadata_of(modules: Mapping[str, LowRank], save_to: Path, original: Path, tuned: Path, base: Base) -> dict[str, str]:
    """The metadata of the extracted LoRA."""
    facts = network_metadata(modules) | base.facts
    facts["ss_sd_model_name"] = original.name
    facts["ss_output_name"] = save_to.stem
    facts["ss_training_comment"] = f"extracted: {tuned.name} - {original.name}"
    return facts | modelspec_of(save_to, base, [tuned.stem, original.stem])
