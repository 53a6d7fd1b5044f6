"""What 100, 10,000 and 1,000,000 images cost before and between the steps, and how many processes share them; without a model.

    python benchmarks/scale.py [--images 100 10000 1000000] [--processes 64]

The images are real files with captions in nine buckets: links to a few hundred small ones, so that a million need names and no
space. Each number of images has a process of its own: seconds to index them (headers, captions, buckets), the peak of its
memory above that of the imports, seconds to the first batch of an epoch, and the median of the next 200 batches of 4. With the
most images also the hand-over of the table to other processes, and their shares. Writes benchmarks/results/scale.md. A million
images take some minutes and 2 million names in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.data.config_keys import DatasetConfig, SubsetConfig  # noqa: E402
from library.data.dataset import TrainingDataset  # noqa: E402
from library.data.loader import EpochSampler, make_loader  # noqa: E402
from library.devices import peak_memory_bytes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "scale.md"
SIDES = [(64 + 8 * step, 64 - 8 * step) for step in range(-4, 5)]  # as 512 + 64 step, and quick to read
BATCH, BATCHES = 4, 200
CAPTION = "a sks dog on the beach, sunny day, blue sky, number {:03d}, photo"
LINKS = 1000  # to one file: NTFS takes 1024


def make_images(folder: Path, count: int) -> None:
    """PNG and JPEG images of all sizes, and captions of some 60 letters."""
    folder.mkdir()
    for first in range(0, count, LINKS * len(SIDES)):
        originals = []
        for number, size in enumerate(SIDES):
            suffix = ".png" if number % 2 else ".jpg"
            image, caption = folder / f"{first + number:07d}{suffix}", folder / f"{first + number:07d}.txt"
            Image.new("RGB", size, (number * 28, 100, 200)).save(image)
            caption.write_text(CAPTION.format(number), encoding="utf-8")
            originals.append((image, caption))
        for number in range(first + len(SIDES), min(count, first + LINKS * len(SIDES))):
            for original in originals[number % len(SIDES)]:
                os.link(original, folder / f"{number:07d}{original.suffix}")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak_mib() -> float:
    return (peak_memory_bytes(torch.device("cpu")) or 0) / 2**20


def index(folder: Path) -> TrainingDataset:
    subset = SubsetConfig(image_dir=folder, caption_extension=".txt")
    config = DatasetConfig(
        resolution=(64, 64), batch_size=BATCH, enable_bucket=True, min_bucket_reso=32, bucket_reso_steps=8, subsets=(subset,)
    )
    return TrainingDataset([config], seed=1)


def measure(folder: Path, world: int) -> dict[str, float]:
    """The figures of one folder, in this process; world: 0, or the processes that share the images."""
    before = peak_mib()
    seconds, dataset = timed(lambda: index(folder))
    found = {"images": len(dataset.table), "index": seconds, "memory": peak_mib() - before}
    batches = iter(make_loader(dataset).epoch(1))
    found["first"], _ = timed(lambda: next(batches))
    found["batch"] = statistics.median(spent for spent, _ in several(batches))
    return found | (shares(dataset, world) if world else {})


def several(batches: Iterator) -> Iterator[tuple[float, Any]]:
    """Seconds and batch, for as many batches as there are, at most 200."""
    for _ in range(BATCHES):
        result = timed(lambda: next(batches, None))
        if result[1] is None:
            return
        yield result


def shares(dataset: TrainingDataset, world: int) -> dict[str, float]:
    """What goes to other processes, what each computes by itself, and how evenly the images are dealt out."""
    packing, packed = timed(lambda: pickle.dumps(dataset.table, protocol=pickle.HIGHEST_PROTOCOL))
    unpacking, _ = timed(lambda: pickle.loads(packed))
    ordering, order = timed(lambda: dataset.batch_order.of_epoch(2))
    counted = SimpleNamespace(num_batches=dataset.num_batches)
    used = np.zeros(len(dataset.table), dtype=np.int32)
    sizes, images = [], []
    for rank in range(world):
        positions = [position for _, position in EpochSampler(counted, 1, rank=rank, world=world)]
        rows = np.concatenate([order[position] for position in positions])
        used[rows] += 1
        sizes.append(len(positions))
        images.append(len(rows))
    assert (used == 1).all(), "each image is used once"
    areas = np.array([width * height for width, height in (bucket.size for bucket in dataset.table.buckets)])[
        dataset.table.bucket
    ]
    by_batch = np.array([areas[order[position]].sum() for position in range(len(order))], dtype=np.float64)
    steps = by_batch[: len(by_batch) // world * world].reshape(-1, world)
    return {
        "packing": packing, "unpacking": unpacking, "packed": len(packed) / 2**20, "order": ordering,
        "order_mib": (order.rows.nbytes + order.sequence.nbytes + order.ends.nbytes) / 2**20,
        "batches": (min(sizes), max(sizes)), "shared": (min(images), max(images)),
        "largest": float((steps.max(1) / steps.mean(1)).mean()),
    }  # fmt: skip


def in_own_process(folder: Path, world: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--measure", str(folder), "--processes", str(world)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(found: dict[str, float]) -> str:
    count = found["images"]
    return (
        f"| {count:,} | {found['index']:.2f} | {1e6 * found['index'] / count:.0f} | {found['memory']:.0f} "
        f"| {found['first']:.2f} | {1e3 * found['batch']:.2f} |"
    )


def shares_text(found: dict[str, Any], world: int) -> str:
    (least, most), (fewest, largest) = found["batches"], found["shared"]
    return (
        f"{world} processes share the {found['images']:,}: the table is {found['packed']:.0f} MiB to each, packed in "
        f"{found['packing']:.1f} s and unpacked in {found['unpacking']:.1f} s; the order of an epoch "
        f"takes each {found['order']:.2f} s and {found['order_mib']:.0f} MiB; {least:,} to {most:,} batches and {fewest:,} to "
        f"{largest:,} images each; the largest batch of a step has {found['largest']:.2f} times the pixels of the mean."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the inner process
    arguments = parser.parse_args()
    if arguments.measure:
        print("\n" + json.dumps(measure(arguments.measure, arguments.processes)))
        return
    load = f", load at the start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    lines = ["# benchmarks/scale.py", "", *__doc__.split("\n\n", 2)[2].strip().splitlines(), ""]
    lines += [f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}{load}.", ""]
    lines += ["| images | indexing, s | an image, us | memory, MiB | first batch of an epoch, s | a batch, ms |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for count in arguments.images:
        with tempfile.TemporaryDirectory() as temporary:
            make_images(Path(temporary) / "images", count)
            is_most = count == max(arguments.images)
            found = in_own_process(Path(temporary) / "images", arguments.processes if is_most else 0)
        shown = [row(found), *(["", shares_text(found, arguments.processes)] if is_most else [])]
        lines += shown
        print("\n".join(shown), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
