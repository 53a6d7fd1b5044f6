"""--debug_dataset: print what the trainer would see, and write it as a contact sheet and as a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from library.data.dataset import Batch, TrainingDataset
from library.data.images import own_mark
from library.errors import counted
from library.files import atomic_write
from library.safe_text import on_terminal
from library.sheets import contact_sheet


def write_debug_sheet(dataset: TrainingDataset, output_dir: Path, batches: int = 8) -> Path:
    """Print the first batches of the first epoch and write their images to `output_dir`/debug_dataset.png.

    Call it before latents are cached: a batch of latents has no images.
    """
    if dataset.latents is not None:
        raise ValueError("images cannot be shown when latents are cached")
    rows: list[list[Image.Image | None]] = []
    labels = []
    for position in range(min(batches, dataset.num_batches)):
        batch = dataset[(1, position)]
        assert batch.images is not None  # as no latents are cached
        print(describe_batch(batch, dataset))
        rows.append([to_image(image) for image in batch.images])
        labels.append(f"batch {position}: {batch.size[0]}x{batch.size[1]}\n" + "\n".join(batch.captions))
    sheet = contact_sheet(
        rows, labels, [], title=f"First {len(rows)} of {counted(dataset.num_batches, 'batch', 'batches')} of epoch 1"
    )
    path = Path(output_dir) / "debug_dataset.png"
    with atomic_write(path) as temporary:
        sheet.save(temporary, pnginfo=own_mark("debug sheet"))
    return path


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 as an image."""
    return Image.fromarray(np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8))


def describe_batch(batch: Batch, dataset: TrainingDataset) -> str:
    """Several lines: the bucket, and the file, loss weight, caption and tokens of each image."""
    width, height = batch.size
    lines = [f"epoch {batch.key[0]}, batch {batch.key[1]}: bucket {width}x{height}, {counted(len(batch.paths), 'image')}"]
    for i, (path, caption) in enumerate(zip(batch.paths, batch.captions, strict=True)):
        lines.append(f"  {on_terminal(path)} (loss weight {batch.loss_weights[i]:g})")
        lines.append(f"    caption: {caption!r}")
        if batch.masks is not None:
            lines.append(f"    mask: {batch.masks[i].mean():.0%} of the image counts")
        if batch.tokens and dataset.tokenizer is not None:
            tokens = dataset.tokenizer.readable(batch.tokens["ids"][i])
            lines.append(f"    {counted(len(tokens), 'token')}: {' '.join(tokens)}")
    return "\n".join(lines)
