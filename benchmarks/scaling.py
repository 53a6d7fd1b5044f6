"""What a million pictures and many processes cost before and between the steps, without a picture or a model.

    python benchmarks/scaling.py [pictures] [processes]

The table of pictures is made up (names, captions, buckets); everything that is timed is the code of training: the planner of
epochs, their order, the shares of the processes, the hand-over of the table. The figures stand in docs/scaling.md.
"""

from __future__ import annotations

import os
import pickle
import platform
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.config_keys import DatasetConfig, SubsetConfig  # noqa: E402
from library.data.loader import EpochSampler  # noqa: E402
from library.data.order import EpochPlanner  # noqa: E402
from library.data.table import Bucket, PictureTable, Subset  # noqa: E402

SIDES = [(512 + 64 * step, 512 - 64 * step) for step in range(-4, 5)]
BATCH = 4
FOLDER = Path("/pictures/all")


def made_up_table(count: int) -> PictureTable:
    """`count` pictures in nine buckets, with captions of some 70 letters."""
    random = np.random.default_rng(1)
    subset = SubsetConfig(image_dir=FOLDER, caption_extension=".txt")
    config = DatasetConfig(resolution=(512, 512), batch_size=BATCH, enable_bucket=True, subsets=(subset,))
    bucket = random.integers(0, len(SIDES), count).astype(np.int32)
    pairs = np.array(SIDES, dtype=np.int32)[bucket]
    zeros = np.zeros(count, dtype=np.int32)
    return PictureTable(
        configs=[config], subsets=[Subset(subset, 0, 0, count)], buckets=[Bucket(0, size) for size in SIDES],
        names=[f"picture_{number:07d}.webp" for number in range(count)],
        captions=[f"a sks dog on the beach, sunny day, blue sky, number {number:07d}, photo" for number in range(count)],
        subset=zeros, bucket=bucket, sizes=pairs * 2, resized=pairs, corner=np.zeros((count, 2), dtype=np.int32),
        ar_error=np.zeros(count, dtype=np.float32), repeats=zeros + 1, held_out=np.zeros(count, dtype=bool), masks=None,
    )  # fmt: skip


def timed(what: str, work):
    start = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - start:.2f} s")
    return result


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    world = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    print(f"{count:,} pictures, {world} processes, batches of {BATCH}; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")  # fmt: skip
    tracemalloc.start()
    table = made_up_table(count)
    print(f"table: {tracemalloc.get_traced_memory()[0] / count:.0f} bytes a picture in each process")
    tracemalloc.stop()

    packed = timed("packing the table for the others", lambda: pickle.dumps(table, protocol=pickle.HIGHEST_PROTOCOL))
    print(f"  {len(packed) / 2**20:.0f} MiB go over the network to each process, once")
    timed("unpacking it", lambda: pickle.loads(packed))
    planner = timed("planner, once", lambda: EpochPlanner(table, seed=1))
    order = timed("order of an epoch, in each process", lambda: planner.order(1))
    print(f"  {len(order):,} batches; {(order.rows.nbytes + order.sequence.nbytes + order.ends.nbytes) / 2**20:.0f} MiB")

    dataset = SimpleNamespace(num_batches=len(planner))
    shares = timed(
        "shares of all processes",
        lambda: [[position for _, position in EpochSampler(dataset, 1, rank=rank, world=world)] for rank in range(world)],
    )
    used = np.zeros(count, dtype=np.int32)
    read = []
    for share in shares:
        rows = np.concatenate([order[position] for position in share])
        used[rows] += 1
        read.append(len(rows))
    assert (used == 1).all(), "each picture is used once"
    print(f"  batches a process: {min(map(len, shares)):,} to {max(map(len, shares)):,}; pictures: {min(read):,} to {max(read):,}")

    pixels = np.array([width * height for width, height in SIDES])[table.bucket]
    by_batch = np.array([pixels[order[position]].sum() for position in range(len(order))], dtype=np.float64)
    whole = len(by_batch) // world * world
    steps = by_batch[:whole].reshape(-1, world)
    print(f"  pixels in the largest batch of a step against their mean: {(steps.max(1) / steps.mean(1)).mean():.2f} times")
    cached = np.arange(count)[0::world]
    print(f"caching: {len(cached):,} pictures a process; {count * 4 * 64 * 64 * 4 / 2**30:.0f} GiB of latents in all at 512 x 512")


if __name__ == "__main__":
    main()
