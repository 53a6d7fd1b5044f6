"""A report about a LoRA file, as lines of text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from library.errors import counted
from library.formats.adapters.kind import Parts
from library.formats.adapters.registry import Adapter
from library.formats.blocks import BASE, block_map, block_of
from library.formats.families import FILE_FAMILIES, titles
from library.formats.lora_file import LoraFile
from library.formats.low_rank import CURE_OF_BROKEN, LowRank, norm
from library.formats.tensor_file import TensorFile

LONGEST = 200  # characters of a metadata value


@dataclass(frozen=True)
class Row:
    """What is computed of one module, once. text: its line, without the name; rank: None if it is no LoRA; norm: of the change at
    full strength, NaN if it is not finite or depends on the model."""

    text: str
    rank: int | None
    norm: float
    is_finite: bool


def report(lora: LoraFile) -> Iterator[str]:
    """The lines of the report."""
    rows = {}
    for name, module in lora.modules.items():
        rows[name] = _row(module)
        lora.windows.forget(module.nbytes)
    yield f"file: {lora.path}"
    yield f"number of LoRA modules: {len(rows)}"
    kinds = Counter(module.title for module in lora.modules.values())
    if set(kinds) != {"LoRA"}:
        yield f"kinds: {', '.join(f'{count} {title}' for title, count in kinds.items())}"
    if lora.left_out:
        yield f"left out: {counted(len(lora.left_out), 'tensor')} that no layer has a use for, such as {lora.left_out[0]}"
    yield f"for: {_family(lora)}; dtype {str(lora.dtype).removeprefix('torch.')}; made by: {maker(lora)}"
    bad = [name for name, row in rows.items() if not row.is_finite]
    broken = f"in {counted(len(bad), 'module')}, so the file is of no use; {CURE_OF_BROKEN}" if bad else ""
    yield f"NaN or infinity: {broken or 'none'}"
    yield ""
    width = max(len(name) for name in rows)
    yield f"{'module':{width}} {'kind':6} {'in':>5} {'out':>5} {'rank':>4} {'alpha':>8} {'|down|':>9} {'|up|':>9} {'|delta|':>9}"
    for name, row in rows.items():
        yield f"{name:{width}} {row.text}"
    yield ""
    yield from _blocks(rows)
    yield ""
    yield "metadata:" if lora.metadata else "metadata: none"
    for key in sorted(lora.metadata):
        value = lora.metadata[key]
        yield f"  {key}: {value if len(value) <= LONGEST else f'{value[:LONGEST]}... ({len(value)} characters)'}"


def _row(adapter: Adapter) -> Row:
    """Mean absolute values of the factors, and the norm of the change; for other kinds than LoRA, what is known."""
    is_finite = adapter.is_finite()
    module = adapter.low_rank() if is_finite else _broken_factors(adapter)
    size = _norm(adapter, module) if is_finite else math.nan
    flag = "" if is_finite else "  NaN or infinity"
    if module is None:
        out_size, in_size = adapter.matrix_shape or ("", "")
        text = f"{'':6} {in_size:5} {out_size:5} {'':4} {'':8} {'':9} {'':9} {size:9.4g}  {adapter.title}{flag}"
        return Row(text, None, size, is_finite)
    out_size, in_size = module.matrix_shape
    positions = module.down[0, 0].numel() if module.down.dim() == 4 else 1
    kind = "linear" if module.down.dim() == 2 else f"conv{int(math.sqrt(positions))}"
    means = [float(factor.abs().mean()) for factor in module.matrices()[::-1]]
    sizes = f"{kind:6} {in_size // positions:5} {out_size:5} {module.rank:4} {module.alpha:8.4g}"
    title = "" if adapter.title == "LoRA" else f"  {adapter.title}"
    return Row(f"{sizes} {means[0]:9.3g} {means[1]:9.3g} {size:9.4g}{title}{flag}", module.rank, size, is_finite)


def _broken_factors(adapter: Adapter) -> LowRank | None:
    """The factors of a LoRA that holds NaN or infinity; None for other kinds."""
    alpha = adapter.parts.tensors.get("alpha")
    if alpha is not None and not math.isfinite(float(alpha)):  # for which `low_rank` raises an error
        tensors = {name: value for name, value in adapter.parts.tensors.items() if name != "alpha"}
        adapter = replace(adapter, parts=Parts(adapter.parts.layer, tensors))
    return adapter.low_rank()


def _norm(adapter: Adapter, module: LowRank | None) -> float:
    """The norm of a finite change at full strength; NaN if it depends on the model."""
    if adapter.needs_weight:
        return math.nan
    if module is not None:
        return norm(module)
    shape = adapter.matrix_shape
    return adapter.weight_change(torch.empty(shape, device="meta")).norm().item() if shape else math.nan


def _blocks(rows: Mapping[str, Row]) -> Iterator[str]:
    yield f"{'block':12} {'modules':>7} {'ranks':>9} {'|delta|':>9}"
    by_block: dict[str, list[Row]] = {}
    for name, row in rows.items():
        by_block.setdefault(block_of(name), []).append(row)
    for block in block_map(rows).with_strengths:
        if block in by_block:
            found = by_block[block]
            ranks = sorted({row.rank for row in found if row.rank is not None})
            text = "" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
            total = math.sqrt(sum(row.norm**2 for row in found))
            yield f"{'text encoder' if block == BASE else block:12} {len(found):7} {text:>9} {total:9.4g}"


def _family(lora: LoraFile) -> str:
    return "unknown family" if len(lora.families) == len(FILE_FAMILIES) else titles(lora.families)


def maker(lora: LoraFile) -> str:
    """The program that made the file, by its metadata."""
    metadata = lora.metadata
    if "lora_adapter_metadata" in metadata or metadata.get("format") == "pt" and len(metadata) == 1:
        return "Diffusers or peft"
    if "ss_merged_from" in metadata or "extracted:" in metadata.get("ss_training_comment", ""):
        return "the tools of this suite"
    if "ss_network_module" in metadata:
        return f"a trainer of kohya's kind ({metadata['ss_network_module']})"
    return "unknown"


def tensors(file: TensorFile) -> Iterator[str]:
    """A line about every tensor of the file."""
    yield f"tensors: {len(file.shapes)} ({_counts(file.dtypes.values())})"
    for key in sorted(file.shapes):
        yield f"  {key} {tuple(file.shapes[key])} {str(file.dtypes[key]).removeprefix('torch.')}"


def _counts(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(f"{count} {str(dtype).removeprefix('torch.')}" for dtype, count in Counter(dtypes).items())
