"""The sum of LoRAs, reduced to a rank module by module; computed from the factors alone if all files are LoRAs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from library.errors import UserError
from library.formats.lora_file import LoraFile, all_names
from library.formats.low_rank import LowRank, best_low_rank, clamp, decompose, delta, is_3x3, rank_for, stack
from library.parallel import on_matrices
from library.tools.block_weights import Strength
from library.tools.changes import WeightOf, dense_change
from library.tools.kept import Kept, Modules, for_module, split_results


def svd_merge(
    loras: Sequence[LoraFile],
    strengths: Sequence[Strength],
    new_rank: int,
    new_conv_rank: int | None = None,
    *,
    device: str = "cpu",
    clamp_quantile: float | None = None,
    weight_of: WeightOf = lambda name: None,
    into: Modules | None = None,
) -> tuple[Modules, Kept]:
    """The sum of strength * LoRA, each module reduced to `new_rank`, or `new_conv_rank` if it is a 3x3 convolution.

    If the ranks of the parts add up to less, the sum is exact and has that rank. weight_of: for modules whose change depends on
    the model. into: where the modules are kept.
    """

    def work(name: str) -> tuple[LowRank, tuple[float, float]]:
        parts = [(lora, strength.of(name)) for lora, strength in zip(loras, strengths, strict=True) if name in lora.modules]
        factors = [(module, factor) for lora, factor in parts if (module := lora.modules[name].low_rank())]
        like: LowRank | Sequence[int]
        if len(factors) == len(parts):
            like = stack(factors)
            limit = rank_for(like.is_3x3, new_rank, new_conv_rank)
            found = for_module(name, decompose, like, device, limit)
        else:
            change = _dense_sum(name, parts, weight_of)
            like = change.shape
            limit = rank_for(is_3x3(like), new_rank, new_conv_rank)
            found = for_module(name, best_low_rank, change.flatten(1).to(device), limit)
        module = found.low_rank(limit, like)
        kept = (found.total**2, (found.total * found.kept(limit)) ** 2)
        for lora, _ in parts:
            lora.windows.forget(lora.modules[name].nbytes)
        return (clamp(module, clamp_quantile) if clamp_quantile is not None else module), kept

    names = all_names(loras)
    results = tqdm(on_matrices(names, work, device), total=len(names), unit="module", desc="merging")
    return split_results(names, results, {} if into is None else into)


def _dense_sum(name: str, parts: Sequence[tuple[LoraFile, float]], weight_of: WeightOf) -> Tensor:
    """The sum of factor * change, in the shape of the first file that is no LoRA (a layer may be Linear or a 1x1 convolution)."""
    total = None
    for lora, factor in sorted(parts, key=lambda part: part[0].modules[name].is_lora):
        module = lora.modules[name].low_rank()
        change = delta(module, factor) if module else dense_change(lora, name, weight_of) * factor
        if total is not None and total.numel() != change.numel():
            raise UserError(f"{lora.path}: {name} is for a layer of another size than in the other files")
        total = change if total is None else total + change.view(total.shape)
    assert total is not None  # a name comes from a file
    return total
