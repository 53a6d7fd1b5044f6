"""What caching latents costs beside the bare VAE, in float32 and in bf16, and how fast a cache on disk is read.

    python benchmarks/caching.py [--size 512] [--images 8] [--precisions no bf16] [--read 20000] [--only encode read]

encode: the trainer's own caching (read, decode, resize, cut, encode, keep) of JPEG images of 1.5 times the training size, beside
the encoder of full-size Stable Diffusion 1.5 on tensors that lie ready, by turns in one process, in the same batches and
precision.
read: batches of 4 with latents of 64 x 64 from that many cached files, all at random places, as an epoch reads them, beside
reading the same bytes by `open`; a file has 65 KB. The files lie in the system's cache, as they do from the second epoch on where
there is memory. Writes benchmarks/results/caching.md, part by part.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result_page import write_parts  # noqa: E402
from benchmarks.train_step import Clock, conditions, precision_name  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "caching.md"
PARTS = ("encode", "read")
ENCODE_HEAD = [
    "| encode | caching, images/s | bare VAE, images/s | bare / caching | of processor time | difference of the latents |",
    "|---|---:|---:|---:|---:|---:|",
]
READ_HEAD = [
    "| read | latents of a run, us of processor time a file | plain reading, us | files/s | MB/s |",
    "|---|---:|---:|---:|---:|",
]
BATCH = 4
EVERY = 100  # batches that are read


# ---------------------------------------------------------------- encoding


def make_photos(folder: Path, size: int, count: int) -> None:
    """JPEG images with smooth shapes and some noise, of 3 : 2, which are resized and cut for training."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    width, height = size * 9 // 4, size * 3 // 2
    across, down = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    for number in range(count):
        noise = np.random.default_rng(number).normal(0, 6, (height, width, 3))
        waves = [np.sin((3 + number) * across + channel) + np.cos((5 + channel) * down) for channel in range(3)]
        pixels = np.clip(127 + 60 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=92)
        (folder / f"{number}.txt").write_text("waves", encoding="utf-8")


def options_for(folder: Path, size: int, precision: str, batch: int, *more: str):
    from library.training.options import parse_options

    return parse_options([
        "--pretrained_model_name_or_path=none", f"--train_data_dir={folder}", "--caption_extension=.txt", "--cache_latents",
        f"--output_dir={folder}", "--output_name=benchmark", "--network_module=networks.lora", f"--resolution={size}",
        f"--mixed_precision={precision}", f"--vae_batch_size={batch}", *more,
    ])  # fmt: skip


def open_images(options, family):
    """The indexed images of a run with these options."""
    from library.training.datasets import dataset_configs, open_dataset

    with contextlib.redirect_stdout(io.StringIO()):
        return open_dataset(options, dataset_configs(options), 1, family)


def model_with_vae(family: str, small: bool, dtype, device):
    """A model that has nothing but a VAE, with random weights that keep signals their size."""
    from library.models.registry import by_name
    from library.models.vae import vae_config
    from library.testing import full_size_configs, small_model

    chosen = by_name(family)
    config = vae_config((32, 32, 64, 64), layers=1) if small else full_size_configs(family)["vae"]
    model = small_model(replace(chosen, parts=(chosen.vae_part,)), {chosen.vae_part.name: config})
    model.vae.to(device, dtype)
    return model


def measure_encoding(folder: Path, family: str, size: int, precision: str, batch: int, rounds: int, small: bool) -> dict:
    """Images a second of the trainer's caching and of the bare VAE, medians of rounds by turns; and the latents."""
    import torch

    from library.devices import DTYPES
    from library.processes import Processes
    from library.training.setup import cache_latents

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_with_vae(family, small, DTYPES[precision], device)
    options = options_for(folder, size, precision, batch)
    dataset = open_images(options, model.family)
    count = len(dataset.table)
    ready = torch.rand(batch, 3, size, size, device=device, dtype=model.vae.dtype) * 2 - 1

    def ours() -> None:
        cache_latents(options.augmentation, dataset, model, Processes(), cure="use another VAE")

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, count, batch):
            model.vae.encode(ready[: min(batch, count - start)]).latent_dist.sample().float().cpu()

    clock, took = Clock(), {ours: [], bare: []}
    bare()  # the first pass of a device
    for turn in range(rounds):
        for work in (ours, bare) if turn % 2 == 0 else (bare, ours):
            clock.read()
            work()
            took[work].append(clock.read())
    (wall, cpu), (bare_wall, bare_cpu) = (
        [statistics.median(column) for column in zip(*took[work], strict=True)] for work in (ours, bare)
    )
    latents = torch.stack([dataset.latents.get(row, False)[0] for row in range(count)])
    return {"ours": count / wall, "bare": count / bare_wall, "ratio": wall / bare_wall, "cpu_ratio": cpu / bare_cpu,
            "latents": latents}  # fmt: skip


def encode_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    images, exact = folder / f"photos{arguments.size}", None
    if not images.exists():
        make_photos(images, arguments.size, arguments.images)
    for precision in arguments.precisions:
        found = measure_encoding(images, "sd1", arguments.size, precision, arguments.batch, arguments.rounds, arguments.small)
        latents = found["latents"]
        exact = latents if exact is None else exact
        yield (
            f"| {arguments.size} px, {precision_name(precision)}, {arguments.batch} at once "
            f"| {found['ours']:.3f} | {found['bare']:.3f} "
            f"| {found['ratio']:.3f} | {found['cpu_ratio']:.3f} | {(latents - exact).norm() / exact.norm():.2%} |"
        )


# ---------------------------------------------------------------- reading


def read_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Files of a cache that is as large as asked, read through the trainer's own class and by plain reading."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from library.data.cache import FOLDER, DiskLatents, cache_path
    from library.data.cache_files import save

    images = folder / "cache"
    (images / FOLDER).mkdir(parents=True, exist_ok=True)
    keys = {row: f"{row:024x}" for row in range(arguments.read)}
    paths = {row: images / f"{row}.png" for row in keys}
    table = SimpleNamespace(path=paths.__getitem__)
    latents = torch.randn(4, 64, 64)
    for row, key in keys.items():
        if not cache_path(paths[row], key).exists():
            save(cache_path(paths[row], key), {"latents": latents})
    cached, order = DiskLatents(table, keys), np.random.default_rng(1)
    size = cache_path(paths[0], keys[0]).stat().st_size

    def ours(rows: list[int]) -> None:
        torch.stack([cached.get(row, False)[0] for row in rows])

    def plain(rows: list[int]) -> None:
        for row in rows:
            cache_path(paths[row], keys[row]).read_bytes()

    clock, took = Clock(), {ours: [], plain: []}
    for _ in range(arguments.rounds):
        batches = order.permutation(arguments.read)[: EVERY * BATCH].reshape(-1, BATCH).tolist()
        for work in (ours, plain):
            clock.read()
            for rows in batches:
                work(rows)
            took[work].append([spent / (len(batches) * BATCH) for spent in clock.read()])
    (wall, cpu), (_, plain_cpu) = ([statistics.median(kind) for kind in zip(*took[work], strict=True)] for work in (ours, plain))
    speed = f"{1 / wall:.0f} | {size / wall / 1e6:.0f}"
    yield f"| {arguments.read:,} files | {1e6 * cpu:.0f} | {1e6 * plain_cpu:.0f} | {speed} |"


# ---------------------------------------------------------------- the page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="as --vae_batch_size")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", type=int, default=20_000, help="files of the cache that is read")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--folder", type=Path, help="where images and files are kept for the next time")
    parser.add_argument("--small", action="store_true", help="a tiny VAE, to try the script out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for part, head, rows in (("encode", ENCODE_HEAD, encode_rows), ("read", READ_HEAD, read_rows)):
            if part not in arguments.only:
                continue
            lines = [conditions() + ".", "", *head]
            for row in rows(arguments, folder):
                print(row, flush=True)
                lines.append(row)
                write_parts(arguments.out, "caching.py", __doc__, {part: lines})


if __name__ == "__main__":
    main()
