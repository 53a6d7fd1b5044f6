"""Seconds and peak memory of the LoRA tools on full-size SD 1.5 and SDXL, beside straightforward ways, in one run.

    python benchmarks/tools.py [--folder SOMEWHERE] [--only NAME ...]

For Linux and macOS. Random weights are made on the fly (8 GB of files; in --folder they stay for the next time): a float16
model, the same with a low-rank change and noise in every layer, and LoRAs of rank 16 and 32 with 3x3 convolutions. Every tool
runs as its own process, from start to end, and so do the straightforward ways to merge and to resize images. None replaces a
file.

The straightforward ways: the full matrix of every module and its `torch.linalg.svd` in float32, once as it is called plainly (all
vectors, also the 11520 x 11520 of a 3x3 convolution) and once thin (`full_matrices=False`); and models loaded whole as Diffusers
modules. A decomposition is timed once for each shape and counted for all modules of it; shapes that cost more than a
1280 x 1280 one are counted in proportion (plain: rows x columns^2, thin: rows^2 x columns, the columns being the longer side),
since the whole would take up to an hour. Writes benchmarks/results/tools.md.

The last rows are of single layers on which many LoRAs are stacked: beyond some rank the full matrix is decomposed instead. The
straightforward way is the SVD of the product in float32, as other tools do it; ours is in float64.

The rows of SDXL (a float16 model of 6.9 GB, float16 LoRAs) have no straightforward way beside them. They need 15 GB of disk: of
the tuned and the merged model only one is there at a time; `--only SDXL` makes and measures these alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.formats.compvis import join_compvis  # noqa: E402
from library.formats.lora_targets import Target, lora_targets  # noqa: E402
from library.formats.low_rank import LowRank, decompose  # noqa: E402
from library.formats.tensor_file import open_tensors  # noqa: E402
from library.formats.tensor_output import rows_in, write_weights  # noqa: E402
from library.models.modules import weights_of  # noqa: E402
from library.models.registry import by_name  # noqa: E402
from library.testing import sd15_configs, sdxl_configs  # noqa: E402

if TYPE_CHECKING:
    from library.models.family import Family

GOALS = {  # times faster, seconds, times less memory, GB
    "svd_merge_lora 16 + 32 to 16": "200 x, 5 s",
    "resize_lora 32 to 8": "100 x, 4 s",
    "extract_lora_from_models dim 4": "20 x, 10 s, 2 GB",
    "merge_lora into a model": "5 x in time, 8 x in memory, 1 GB",
    "resize_images_to_resolution": "1.8 x on 2 cores",
    "SDXL: merge_lora into a model": "1 GB",
    "SDXL: extract_lora_from_models dim 4": "1 GB",
}
STACKS = [
    (out, size, rank) for out, size in ((320, 320), (640, 640), (1280, 1280), (320, 2880)) for rank in (128, 256, 512, 1024, 2048)
]
SDXL = "SDXL: "  # how the names of its rows begin
MADE = "made"  # the folder, in that of the files, that every measurement finds empty
LARGEST = 1280**3  # rows^2 x columns of the costliest decomposition that is run

# ---------------------------------------------------------------- files


def model_shapes(family: Family, configs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this family and these configurations of its parts."""
    parts = {part.name: weights_of(part.build(configs[part.name])) for part in family.parts}
    return {name: tuple(value.shape) for name, value in join_compvis(parts, family.layout).items()}


@dataclass(frozen=True)
class Files:
    """The files of one family in a folder: a model, the same tuned, and LoRAs. dtype: of the LoRAs."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.safetensors")

    def make_model(self) -> None:
        tensor = lru_cache(4)(self._tensor)
        self._write("model", tensor)

    def make_loras(self) -> None:
        layers = {name: self.shapes[target.key] for name, target in self.targets.items()}
        thirds = {name: target for name, target in self.targets.items() if target.third is not None}
        layers |= {name: (self.shapes[target.key][0] // 3, *self.shapes[target.key][1:]) for name, target in thirds.items()}
        for rank in (16, 32):
            write_lora(Path(self.path(f"rank{rank}")), layers, rank, self.dtype)

    def make_tuned(self) -> None:
        """The model with a low-rank change and noise in every layer."""
        keys = {target.key for target in self.targets.values()}

        @lru_cache(4)
        def tuned(name: str) -> Tensor:
            value = self._tensor(name)
            if name not in keys:
                return value
            generator = torch.Generator().manual_seed(hash_of(name) + 1)
            rows, columns = len(value), value[0].numel()
            change = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator) * 3e-4
            change += torch.randn(rows, columns, generator=generator) * 3e-4
            return (value.float() + change.view(value.shape)).half()

        self._write("tuned", tuned)

    @property
    def targets(self) -> dict[str, Target]:
        return lora_targets(self.shapes)

    def _tensor(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(hash_of(name))
        return (torch.randn(self.shapes[name], generator=generator) * 0.02).half()

    def _write(self, name: str, tensor: Callable[[str], Tensor]) -> None:
        plan = {name: (shape, torch.float16) for name, shape in self.shapes.items()}
        write_weights(Path(self.path(name)), plan, lambda name, rows: rows_in(tensor(name), rows), {})


def sd1_files(folder: Path) -> Files:
    return Files(folder, model_shapes(by_name("sd1"), sd15_configs()), torch.float32)


def sdxl_files(folder: Path) -> Files:
    return Files(folder / "sdxl", model_shapes(by_name("sdxl"), sdxl_configs()), torch.float16)


def hash_of(name: str) -> int:
    return sum(place * byte for place, byte in enumerate(name.encode(), 1))


def write_lora(path: Path, layers: Mapping[str, tuple[int, ...]], rank: int, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for name, shape in layers.items():
        up = torch.randn(shape[0], rank, generator=generator) * 0.01
        tensors[f"{name}.lora_up.weight"] = up[:, :, None, None] if len(shape) == 4 else up
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator) * 0.01
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path)


def make_images(folder: Path) -> None:
    """48 images of 1600 x 1200, half JPEG and half PNG, smooth with some noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(48):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth).astype(np.int16) + rng.integers(-6, 7, (1200, 1600, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / (f"{number}.jpg" if number % 2 else f"{number}.png"), quality=92, compress_level=1)


# ---------------------------------------------------------------- straightforward ways, each run as a process of its own


THIN = False  # whether the decompositions leave out the vectors that nobody wants (`full_matrices=False`)


def plain_svd(folder: Path, shapes: Counter, work) -> float:
    """Seconds of `work` on one module of every shape, counted for all; costly shapes in proportion."""
    seconds, rate = 0.0, []
    for shape, count in sorted(shapes.items(), key=lambda item: cost(item[0])):
        if cost(shape) <= LARGEST:
            started = time.perf_counter()
            work(shape)
            once = time.perf_counter() - started
            rate.append((cost(shape), once))
        else:
            base, base_seconds = rate[-1]
            once = base_seconds * cost(shape) / base
        seconds += once * count
    return seconds


def cost(shape: tuple[int, int]) -> int:
    """Of the thin decomposition min^2 max; of the plain one, which makes all vectors of the long side too, min max^2."""
    return min(shape) ** 2 * max(shape) if THIN else min(shape) * max(shape) ** 2


def matrix_shapes(folder: Path, with_3x3: bool) -> Counter:
    with open_tensors(folder / "model.safetensors") as file:
        found = Counter()
        for target in lora_targets(file.shapes, with_3x3).values():
            shape = file.shapes[target.key]
            found[(shape[0], torch.Size(shape[1:]).numel())] += 1
        return found


def plain_svd_merge(folder: Path) -> float:
    def work(shape: tuple[int, int]) -> None:
        matrix = sum(torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) for rank in (16, 32))
        keep(torch.linalg.svd(matrix, full_matrices=not THIN), 16)

    return plain_svd(folder, matrix_shapes(folder, with_3x3=True), work)


def plain_resize(folder: Path) -> float:
    def work(shape: tuple[int, int]) -> None:
        keep(torch.linalg.svd(torch.randn(shape[0], 32) @ torch.randn(32, shape[1]), full_matrices=not THIN), 8)

    return plain_svd(folder, matrix_shapes(folder, with_3x3=True), work)


def plain_extract(folder: Path) -> float:
    from library.models.loading import load_stable_diffusion

    started = time.perf_counter()
    models = [load_stable_diffusion(str(folder / f"{name}.safetensors")) for name in ("model", "tuned")]
    loading = time.perf_counter() - started
    seconds = plain_svd(
        folder,
        matrix_shapes(folder, with_3x3=False),
        lambda shape: keep(torch.linalg.svd(torch.randn(*shape), full_matrices=not THIN), 4),
    )
    del models
    return loading + seconds


def keep(parts: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = parts
    return u[:, :rank] * s[:rank], vh[:rank].clone()


def plain_merge(folder: Path) -> None:
    from library.models.loading import load_stable_diffusion
    from library.models.saving import save_stable_diffusion
    from networks.lora import create_network_from_weights

    model = load_stable_diffusion(str(folder / "model.safetensors"), dtype=torch.float32)
    for rank, ratio in ((16, 0.8), (32, 0.5)):
        network, weights = create_network_from_weights(
            ratio, folder / f"rank{rank}.safetensors", None, model.text_encoders[0], model.denoiser
        )
        network.merge_to(model.text_encoders[0], model.denoiser, weights)
    save_stable_diffusion(model, folder / MADE / "merged.safetensors", torch.float16)


def plain_images(folder: Path) -> None:
    import cv2
    import numpy as np
    from PIL import Image

    cv2.setNumThreads(1)
    target = folder / MADE
    for path in sorted((folder / "images").iterdir()):
        shutil.copyfile(path, target / path.name)
        image = Image.open(path).convert("RGB")
        for side in (512, 384, 256):
            factor = (side * side / (image.width * image.height)) ** 0.5
            size = int(image.width * factor), int(image.height * factor)
            pixels = cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_AREA)
            Image.fromarray(pixels).save(target / f"{path.stem}+{side}x{side}.jpg", quality=100)


PLAIN = {
    "svd_merge_lora 16 + 32 to 16": plain_svd_merge,
    "resize_lora 32 to 8": plain_resize,
    "extract_lora_from_models dim 4": plain_extract,
    "merge_lora into a model": plain_merge,
    "resize_images_to_resolution": plain_images,
}

DECOMPOSING = [name for name, way in PLAIN.items() if way in (plain_svd_merge, plain_resize, plain_extract)]

# ---------------------------------------------------------------- measuring


def commands(files: Files) -> dict[str, list[str]]:
    def made(name: str) -> str:
        return str(files.folder / MADE / name)

    loras = [files.path("rank16"), files.path("rank32")]
    merge = ["networks/merge_lora.py", "--models", *loras, "--ratios", "0.8", "0.5"]
    extract = ["networks/extract_lora_from_models.py", "--model_org", files.path("model"), "--model_tuned", files.path("tuned")]
    images = ["tools/resize_images_to_resolution.py", "--max_resolution", "512x512,384x384,256x256"]
    svd = ["networks/svd_merge_lora.py", "--models", *loras, "--ratios", "0.6", "0.4", "--new_rank", "16"]
    resize = ["networks/resize_lora.py", "--model", loras[1], "--new_rank", "8"]
    return {
        "svd_merge_lora 16 + 32 to 16": [*svd, "--save_to", made("svd.safetensors")],
        "resize_lora 32 to 8": [*resize, "--save_to", made("resized.safetensors")],
        "extract_lora_from_models dim 4": [*extract, "--save_to", made("extracted.safetensors"), "--dim", "4"],
        "merge_lora into a model": [*merge, "--sd_model", files.path("model"), "--save_to", made("merged.safetensors")],
        "merge_lora of LoRAs": [*merge, "--save_to", made("both.safetensors")],
        "check_lora_weights": ["networks/check_lora_weights.py", files.path("rank32")],
        "resize_images_to_resolution": [*images, str(files.folder / "images"), made("small")],
    }


SDXL_ROWS = ("svd_merge_lora 16 + 32 to 16", "merge_lora into a model", "extract_lora_from_models dim 4")


# A process begins with the peak memory of the one that started it, which here holds torch; so a small one starts them.
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[2:]).returncode
seconds = time.perf_counter() - started
open(sys.argv[1], "w").write(f"{status} {seconds} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
"""


def measured(words: list[str]) -> tuple[float, float, str]:
    """Seconds, peak memory in GB and the output of a Python process."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        report = Path(folder) / "report"
        command = [sys.executable, "-S", "-c", LAUNCHER, str(report), sys.executable, *words]
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=True)
        output.seek(0)
        text = output.read()
        status, seconds, peak = report.read_text(encoding="utf-8").split()
    if int(status):
        raise SystemExit(f"{' '.join(words)} failed:\n{text[-2000:]}")
    return float(seconds), int(peak) / (2**30 if sys.platform == "darwin" else 2**20), text


def copy_seconds(folder: Path) -> float:
    """Seconds to copy the model and flush it to disk, which no tool that writes one can beat by much."""
    started = time.perf_counter()
    with open(folder / "model.safetensors", "rb") as source, open(folder / MADE / "copy.safetensors", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
        os.fsync(target.fileno())
    return time.perf_counter() - started


def clear(folder: Path) -> None:
    """Make the folder for what is made anew, so that nothing is replaced."""
    shutil.rmtree(folder / MADE, ignore_errors=True)
    (folder / MADE).mkdir(parents=True)


def asked_for(only: list[str], name: str) -> bool:
    return not only or any(part in name for part in only)


def run(folder: Path, only: list[str]) -> list[str]:
    clear(folder)
    import_seconds = measured(["-c", "import torch"])[0]
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}; "
        f"load of the machine at the start {os.getloadavg()[0]:.1f}; `import torch` alone: {import_seconds:.1f} s.",
        "",
        "| tool | seconds | peak GB | straightforward: seconds | peak GB | times faster | times less memory | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    files = sd1_files(folder)
    if any(asked_for(only, name) for name in commands(files)):
        lines += sd1_rows(files, only, import_seconds)
    if any(asked_for(only, SDXL + name) for name in SDXL_ROWS):
        lines += sdxl_rows(sdxl_files(folder), only)
    return lines + stack_rows(only)


def stack_rows(only: list[str]) -> list[str]:
    """LoRAs stacked to a high rank: `decompose` beside the thin SVD of their product, in float32 and in float64, each the fastest
    of five."""
    lines = []
    for out_size, in_size, rank in STACKS:
        name = f"decompose {out_size} x {in_size} of rank {rank}"
        if not asked_for(only, name):
            continue
        generator = torch.Generator().manual_seed(rank)
        up, down = torch.randn(out_size, rank, generator=generator), torch.randn(rank, in_size, generator=generator)
        module = LowRank(up, down, float(rank))
        seconds = fastest(lambda module=module: decompose(module, most=16))
        for start, dtype in ((name, torch.float32), ("- beside float64", torch.float64)):
            factors = up.to(dtype), down.to(dtype)
            plain = fastest(lambda factors=factors: torch.linalg.svd(factors[0] @ factors[1], full_matrices=False))
            goal = "above 0.83" if dtype == torch.float32 else "-"
            lines.append(f"| {start} | {seconds:.4f} | - | {plain:.4f} | - | {plain / seconds:.2f} | - | {goal} |")
            print(lines[-1], flush=True)
    return lines


def fastest(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def sdxl_rows(files: Files, only: list[str]) -> list[str]:
    """The tools on SDXL's large files, of which the tuned model is made last, when no merged one is there."""
    clear(files.folder)
    print("making files of SDXL ...", flush=True)
    if not Path(files.path("rank32")).exists():
        files.make_model()
        files.make_loras()
    lines = []
    for name in SDXL_ROWS:
        if not asked_for(only, SDXL + name):
            continue
        words = commands(files)[name]
        clear(files.folder)
        if files.path("tuned") in words and not Path(files.path("tuned")).exists():
            files.make_tuned()
        seconds, peak, _ = measured(words)
        lines.append(f"| {SDXL}{name} | {seconds:.1f} | {peak:.2f} | - | - | - | - | {GOALS.get(SDXL + name, '-')} |")
        print(lines[-1], flush=True)
        clear(files.folder)
        Path(files.path("tuned")).unlink(missing_ok=True)
    return lines


def sd1_rows(files: Files, only: list[str], import_seconds: float) -> list[str]:
    folder = files.folder
    if not (folder / "done").exists():
        print("making files ...", flush=True)
        files.make_model()
        files.make_tuned()
        files.make_loras()
        make_images(folder / "images")
        (folder / "done").touch()
    lines = [f"| copying the model's 2 GB to disk | {copy_seconds(folder):.1f} | - | - | - | - | - | - |"]
    for name, words in commands(files).items():
        if not asked_for(only, name):
            continue
        clear(folder)
        seconds, peak, _ = measured(words)
        row = f"| {name} | {seconds:.1f} | {peak:.2f} |"
        ways = [[], ["--thin"]] if name in DECOMPOSING else [[]] if name in PLAIN else []
        rows = [] if ways else [row + " - | - | - | - | - |"]
        for way in ways:
            clear(folder)
            own = [str(Path(__file__).resolve()), "--plain", name, "--folder", str(folder), *way]
            plain_seconds, plain_peak, text = measured(own)
            if name in DECOMPOSING:
                plain_seconds = float(text.split()[-1]) + import_seconds  # as it was counted
            start = row if not way else f"| - beside the thin SVD | {seconds:.1f} | {peak:.2f} |"
            goal = GOALS[name] if not way else "-"
            times = f"{plain_seconds / seconds:.1f} | {plain_peak / peak:.1f}"
            rows.append(f"{start} {plain_seconds:.0f} | {plain_peak:.2f} | {times} | {goal} |")
        print("\n".join(rows), flush=True)
        lines += rows
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to make the files and keep them (default: a temporary folder)")
    parser.add_argument("--only", nargs="*", default=[], help="parts of tools' names")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("--thin", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        global THIN
        THIN = args.thin
        print(PLAIN[args.plain](Path(args.folder)))
        return
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
        lines = run(Path(args.folder), args.only)
    else:
        with tempfile.TemporaryDirectory() as folder:
            lines = run(Path(folder), args.only)
    if not args.only:
        intro = ["# benchmarks/tools.py", "", *__doc__.split("\n\n", 2)[2].strip().splitlines(), ""]
        (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
        (ROOT / "benchmarks" / "results" / "tools.md").write_text("\n".join([*intro, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
