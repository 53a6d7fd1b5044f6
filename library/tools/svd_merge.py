"""The sum of LoRAs, cut to a rank module by module. It is found from the factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from library.formats.blocks import block_of
from library.formats.lora_file import LoraFile, all_names
from library.formats.low_rank import LowRank, clamp, decompose, stack
from library.parallel import on_matrices
from library.tools.kept import Kept, named, split_results


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
