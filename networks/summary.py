"""A network in words, before it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from library.errors import counted
from networks.lora import UNET_PREFIX, LoRAModule, kernel_size
from networks.lora_args import NetworkArgs


def summary(parts: Mapping[str, Sequence[LoRAModule]], args: NetworkArgs, dtype: torch.dtype | None = None) -> str:
    """Modules, ranks, trainable parameters, the size of the file in this dtype (None: as it is); a chart if blocks differ.

    parts: the modules by the prefix of their names.
    """
    unet, modules = parts.get(UNET_PREFIX, []), [module for part in parts.values() for module in part]
    blocks: dict[str, list[LoRAModule]] = {}
    for module in sorted(unet, key=lambda m: args.blocks.block_index(m.lora_name) or 0):
        blocks.setdefault(args.blocks.names[args.blocks.block_index(module.lora_name) or 0], []).append(module)
    size = sum(t.numel() * (dtype or t.dtype).itemsize for m in modules for t in m.file_weights().values()) / 2**20
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    lines = [
        f"{counted(len(modules), 'LoRA module')}, {parameters:,} trainable parameters; a file will have about {size:.1f} MiB"
    ]
    is_uniform = args.lr_weights is None and ";" not in ranks_text(unet).replace("; 3x3", "")
    for prefix, part in parts.items():
        ranks = f", {ranks_text(part)}" if is_uniform or prefix != UNET_PREFIX else ""
        lines.append(f"  {part_title(prefix)}: {counted(len(part), 'module')}{ranks}")
    if is_uniform:
        counts = ", ".join(f"{name} {len(block)}" for name, block in blocks.items())
        return "\n".join(lines + [f"  modules by block: {counts}"] * bool(blocks))
    rows = [(name, len(block), (ranks_text(block), *_bars(args, block))) for name, block in blocks.items()]
    widths = [max(len(texts[i]) for *_, texts in rows) for i in (0, 1)]
    return "\n".join(
        lines + [f"  {n:5} {c:3} modules  {r:{widths[0]}}  {a:{widths[1]}}  {b}".rstrip() for n, c, (r, a, b) in rows]
    )


def part_title(prefix: str) -> str:
    """`U-Net`, `text encoder`, or `text encoder 2`, say, for the prefix of LoRA names."""
    return "U-Net" if prefix == UNET_PREFIX else f"text encoder {prefix.removeprefix('lora_te')}".rstrip()


def ranks_text(modules: Sequence[LoRAModule]) -> str:
    """`rank 4, alpha 1; 3x3: rank 2, alpha 1`; each rank once."""
    kinds = sorted({(kernel_size(m.lora_down) > 1, m.rank, round(m.alpha.item(), 3)) for m in modules})
    return "; ".join(f"{'3x3: ' if is_3x3 else ''}rank {rank}, alpha {alpha:g}" for is_3x3, rank, alpha in kinds)


def _bars(args: NetworkArgs, modules: Sequence[LoRAModule]) -> tuple[str, str]:
    """A block's largest rank as a bar, a mark for 2 ranks, and the weight of its learning rate as one, a mark for 0.1."""
    ranks = "#" * min(32, -(-max(module.rank for module in modules) // 2))
    if args.lr_weights is None:
        return ranks, ""
    weight = args.lr_block(modules[0].lora_name)[1]
    return ranks, f"rate x {weight:<5.3g} " + "=" * min(40, round(10 * weight))
