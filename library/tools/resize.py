"""A LoRA of a lower rank: every module becomes its best approximation of the new rank, at the same strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm

from library.formats.lora_file import LoraFile
from library.formats.low_rank import (
    Decomposition,
    LowRank,
    best_low_rank,
    decompose,
    exact_low_rank,
    is_3x3,
    rank_for,
    smallest_rank,
)
from library.parallel import on_matrices
from library.tools.changes import WeightOf, dense_change
from library.tools.kept import Kept, Modules, for_module, split_results


def resize(
    lora: LoraFile,
    new_rank: int,
    new_conv_rank: int | None = None,
    *,
    method: str | None = None,
    target: float = 0.0,
    device: str = "cpu",
    report: Callable[[str], None] | None = None,
    weight_of: WeightOf = lambda name: None,
    into: Modules | None = None,
) -> tuple[Modules, Kept]:
    """Every module cut to `new_rank`, or `new_conv_rank` if it is a 3x3 convolution; with `method`, to the smallest rank up to
    that which reaches `target` (see `smallest_rank`). No rank grows. report: gets a line about every module. weight_of: for
    modules whose change depends on the model. into: where the modules are kept."""

    def work(name: str) -> tuple[LowRank, tuple[float, float]]:
        module = lora.modules[name].low_rank()
        like: LowRank | Sequence[int]
        if module is not None:
            limit = min(rank_for(module.is_3x3, new_rank, new_conv_rank), module.rank)
            found = for_module(name, decompose, module, device, limit)
            like, scale = module, module.scale
        else:
            change = dense_change(lora, name, weight_of)
            like, scale, matrix = change.shape, 1.0, change.flatten(1).to(device)
            limit = min(rank_for(is_3x3(change.shape), new_rank, new_conv_rank), *matrix.shape)
            found = for_module(name, exact_low_rank if method else best_low_rank, matrix, limit)
        rank = min(limit, smallest_rank(found.s, method, target)) if method else limit
        result = found.low_rank(rank, like, scale)
        if report:
            report(_line(name, found, result))
        lora.windows.forget(lora.modules[name].nbytes)
        return result, (found.total**2, (found.total * found.kept(rank)) ** 2)

    names = list(lora.modules)
    results = on_matrices(names, work, device)
    progress = tqdm(results, total=len(names), unit="module", desc="resizing", disable=report is not None)
    return split_results(names, progress, {} if into is None else into)


def _line(name: str, found: Decomposition, module: LowRank) -> str:
    s, rank = found.s, min(module.rank, len(found.s))
    share = float(s[:rank].sum() / s.sum()) if s[0] > 0 else 1.0
    ratio = float(s[0] / s[rank - 1]) if s[rank - 1] > 0 else float("inf")
    kept = f"sum {share:6.1%} norm {found.kept(rank):6.1%} ratio {ratio:.1f}"
    return f"{name:75} rank {module.rank:3} alpha {module.alpha:<8.4g} {kept}"
