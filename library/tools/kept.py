"""The part of the norm that LoRA modules keep at a lower rank: collected by module, printed by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, TypeVar

from library.errors import UserError
from library.formats.blocks import BASE, block_map, block_of
from library.formats.low_rank import LowRank

Result = TypeVar("Result")
Kept = dict[str, tuple[float, float]]  # squared norm before and after, by module
Modules = MutableMapping[str, LowRank]


def split_results(
    names: Sequence[str], results: Iterable[tuple[LowRank, tuple[float, float]]], into: Modules
) -> tuple[Modules, Kept]:
    """Modules, in `into`, and norms by name, from pairs in the order of the names."""
    kept = {}
    for name, (module, norms) in zip(names, results, strict=True):
        into[name], kept[name] = module, norms
    return into, kept


def for_module(name: str, function: Callable[..., Result], *values: Any) -> Result:
    """function(*values). The message of a UserError gets the name of the module."""
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
    for block in (*block_map(kept).with_strengths, "all"):
        if block in sums:
            before, after = sums[block]
            print(f"  {'text encoder' if block == BASE else block:12} {(after / before) ** 0.5 if before else 1:7.2%}")
