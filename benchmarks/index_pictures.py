"""How long it takes to index a folder of 100,000 pictures, and how much memory the index holds.

    python benchmarks/index_pictures.py [count]

Goal: under 60 seconds and under 1 KB a picture. The pictures (with a caption file each) are made in a temporary folder.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.config_keys import DatasetConfig, SubsetConfig  # noqa: E402
from library.data.dataset import TrainingDataset  # noqa: E402
from library.data.index import index_folders  # noqa: E402

CAPTION = "a picture of a sks dog on the beach, sunny day, blue sky, number {}"


def make_pictures(folder: Path, count: int) -> None:
    """`count` tiny files of 40 different sizes, in PNG and JPEG by turns."""
    contents = []
    for number in range(40):
        buffer = io.BytesIO()
        image = Image.new("RGB", (64 + 8 * (number % 8), 64 + 8 * (number // 8)), (number * 6, 100, 200))
        image.save(buffer, "PNG" if number % 2 else "JPEG")
        contents.append((".png" if number % 2 else ".jpg", buffer.getvalue()))
    for number in range(count):
        suffix, content = contents[number % len(contents)]
        (folder / f"picture_{number:06d}{suffix}").write_bytes(content)
        (folder / f"picture_{number:06d}.txt").write_bytes(CAPTION.format(number).encode())


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        make_pictures(folder, count)
        print(f"made {count:,} pictures in {time.perf_counter() - start:.1f} s ({os.cpu_count()} cores)")

        start = time.perf_counter()
        index_folders([folder])
        print(f"sizes: {time.perf_counter() - start:.1f} s")

        subset = SubsetConfig(image_dir=folder, caption_extension=".txt")
        config = DatasetConfig(
            resolution=(64, 64), min_bucket_reso=32, bucket_reso_steps=8, enable_bucket=True, subsets=(subset,)
        )
        start = time.perf_counter()
        TrainingDataset([config], seed=1)
        print(f"sizes, captions and buckets: {time.perf_counter() - start:.1f} s")

        tracemalloc.start()
        dataset = TrainingDataset([config], seed=1)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        print(f"memory: {held / count:.0f} bytes a picture held, {peak / count:.0f} at the peak; {dataset.num_batches:,} batches")


if __name__ == "__main__":
    main()
