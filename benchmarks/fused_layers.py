"""What a LoRA adds to the time of one frozen layer of SD 1.5: as one function with it, and one operation after the other.

    python benchmarks/fused_layers.py [--size 256 512] [--rank 4] [--rounds 10]

Forward and backward to the input and to the LoRA, float32, batch 1, one thread, beside the frozen layer alone; the least
processor time of the rounds, by turns, so that a busy machine does no harm. Writes benchmarks/results/fused_layers.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "fused_layers.md"
# channels in and out, kernel, stride, pixels of the image to a position, on a side; kernel 0: a linear layer
LAYERS = (
    (320, 320, 3, 1, 8), (960, 320, 3, 1, 8), (320, 320, 3, 2, 8), (640, 640, 3, 1, 16), (1280, 1280, 3, 1, 32),
    (1280, 1280, 3, 1, 64), (320, 320, 1, 1, 8), (320, 320, 0, 1, 8), (1280, 1280, 0, 1, 32),
)  # fmt: skip
HEAD = ["| layer | alone, ms | as one function | one after the other |", "|---|---:|---:|---:|"]


def make_layer(channels: int, out: int, kernel: int, stride: int):
    """A frozen layer as training has it."""
    from torch import nn

    from library.training.memory.frozen import freeze_layers

    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2) if kernel else nn.Linear(channels, out)
    freeze_layers(layer.requires_grad_(False))
    return layer


def measure(spec: tuple[int, ...], size: int, rank: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    import torch
    from torch import nn

    from networks.lora import LoRAModule
    from networks.suite_module import SuiteModule

    channels, out, kernel, stride, pixels = spec
    side, ways = size // pixels, {}
    for way in ("alone", "one function", "one after the other"):
        ways[way] = make_layer(channels, out, kernel, stride)
        if way != "alone":
            module = (SuiteModule if way == "one function" else LoRAModule)("lora", ways[way], rank, rank)
            nn.init.normal_(module.lora_up.weight)
            module.attach(ways[way])
    x = torch.randn((1, channels, side, side) if kernel else (1, side * side, channels), requires_grad=True)
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way, layer in ways.items():
            started = time.process_time()
            y = layer(x * 1.0)
            y.backward(torch.ones_like(y))
            least[way] = min(least[way], 1e3 * (time.process_time() - started))
            x.grad = None
    return least


def row(spec: tuple[int, ...], size: int, rank: int, rounds: int) -> str:
    channels, out, kernel, stride, pixels = spec
    found = measure(spec, size, rank, rounds)
    alone, side = found["alone"], size // pixels
    kind = f"{kernel} x {kernel}" + (f", stride {stride}" if stride > 1 else "") if kernel else "linear"
    added = [f"+{100 * (found[way] / alone - 1):.1f} %" for way in ("one function", "one after the other")]
    return f"| {size} px: {channels} to {out}, {kind}, {side} x {side} | {alone:.1f} | {' | '.join(added)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import torch

    from benchmarks.train_step import conditions

    torch.set_num_threads(1)
    lines = ["# benchmarks/fused_layers.py", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [f"Rank {arguments.rank}; {conditions()}.", "", *HEAD]
    for size in arguments.size:
        for spec in LAYERS:
            lines.append(row(spec, size, arguments.rank, arguments.rounds))
            print(lines[-1], flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
